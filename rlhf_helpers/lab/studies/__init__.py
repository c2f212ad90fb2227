"""Studies: what takes longer than a lesson, run by one command, stored as CSV with a manifest."""

import importlib
import pkgutil

from rlhf_helpers.core.stats import prediction_interval
from rlhf_helpers.lab.studies.record import STUDIES, Study, load_study


def all_studies() -> dict[str, Study]:
    """Import every module of this folder and return the studies by name."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return STUDIES
