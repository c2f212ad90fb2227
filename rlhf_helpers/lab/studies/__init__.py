"""Studies: what takes longer than a lesson, run by one command, stored as CSV with a manifest."""

from rlhf_helpers.core.stats import prediction_interval
from rlhf_helpers.lab.studies.record import load_study
