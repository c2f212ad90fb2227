"""Studies: what they store can be read, repeated and trusted; each runs end to end in small."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_helpers.__main__ import STORED, main
from rlhf_helpers.lab.studies import all_studies, lesson1, load_study, record
from rlhf_helpers.lab.studies.real_preferences import real_preferences
from rlhf_helpers.reward_model import RewardSettings
from rlhf_helpers.world.annotators import make_pairs

pytestmark = pytest.mark.slow

# before this file makes studies of its own
NAMES = sorted(all_studies())


def polite_pairs(count):
    """The better answer says thank you; nothing else tells the two apart."""
    words = ["tea", "sad", "today", "water", "Paris", "question", "three", "leaves", "pour", "cup"]
    pairs = [(words[i % 10], words[(i * 7 + i // 10) % 10], i) for i in range(count)]
    return [
        {"prompt": f"{one} {i}?", "chosen": f"thank you, {other}", "rejected": f"no way, {other}"}
        for one, other, i in pairs
    ]


# what a row of a study may leave open: a side without a debater, no labels before training, ...
MAY_BE_EMPTY = {
    # their rows are of several kinds, named in the column `part`, and each kind has columns of its own
    "real_reward_model": {"name", "low", "high", "n", "confidence", "prompt", "response"},
    "real_safety": {"kind", "value", "low", "high", "n", "prompt", "response", "refused"},
    "real_chatbot": {"value", "low", "high", "n", "prompt", "raw", "response", "latency", "finish_reason"},
    "constitutional_training": {"labels_right"},
    "red_team_policy": {"kl_coef"},
    "gradient_attacks": {"loss_heldout", "trained", "heldout", "matched", "suffix"},
    "debate": {"honest_verified", "dishonest_verified"},
    "recursive_judges": {"helper_agreement"},
}


@functools.partial(record.study, seeds=range(1, 3))
def doubled(seed, factors=(2,), offset=0, **unused):
    """Multiply the seed."""
    for factor in factors:
        yield {"factor": factor, "product": seed * factor + offset}


@functools.partial(record.study, seeds=(1,))
def counted(seed, data):
    """Count the letters of a file."""
    yield {"letters": len(Path(data).read_text())}


record.STUDIES.pop("doubled")
record.STUDIES.pop("counted")


class TestRunner:
    def test_a_row_per_seed_and_measurement(self):
        assert doubled(factors=(2, 3)).to_dict("list") == {
            "seed": [1, 1, 2, 2],
            "factor": [2, 3, 2, 3],
            "product": [2, 3, 4, 6],
        }
        assert doubled(seeds=(5,), offset=1).to_dict("records") == [{"seed": 5, "factor": 2, "product": 11}]
        assert (doubled.__name__, doubled.__doc__) == ("doubled", "Multiply the seed.")

    def test_the_manifest_holds_seeds_and_settings(self, tmp_path, capsys):
        doubled(tmp_path, offset=1)
        manifest = json.loads((tmp_path / "doubled.json").read_text())
        assert manifest["study"] == "doubled"
        assert manifest["seeds"] == [1, 2]
        assert (manifest["factors"], manifest["offset"], manifest["unused"]) == ([2], 1, {})
        assert manifest["command"] == "python -m rlhf_helpers study doubled"
        assert manifest["minutes"] == 0.0
        assert (tmp_path / "doubled.csv").read_text() == "seed,factor,product\n1,2,3\n2,2,5\n"
        assert capsys.readouterr().out.splitlines()[0] == "{'seed': 1, 'factor': 2, 'product': 3}"

    def test_the_command_names_the_data_without_their_folder(self, tmp_path, capsys):
        (tmp_path / "pairs.txt").write_text("abc")
        assert counted(tmp_path, data=tmp_path / "pairs.txt").letters.tolist() == [3]
        manifest = json.loads((tmp_path / "counted.json").read_text())
        assert manifest["command"] == "python -m rlhf_helpers study counted --data pairs.txt"
        assert manifest["sha256"] == hashlib.sha256(b"abc").hexdigest()

    def test_what_was_written_is_read_again(self, tmp_path, capsys):
        table = doubled(tmp_path, factors=(0.5,), unused=RewardSettings())
        found = load_study("doubled", tmp_path)
        assert found.equals(table)
        assert found.attrs["seeds"] == [1, 2]
        assert found.attrs["unused"]["unused"]["epochs"] == RewardSettings().epochs
        assert "torch" in found.attrs["versions"]
        with pytest.raises(FileNotFoundError, match="there are doubled"):
            load_study("other", tmp_path)

    def test_a_run_that_stops_keeps_its_rows_beside_the_stored_ones(self, tmp_path, capsys):
        doubled(tmp_path)
        stored = (tmp_path / "doubled.csv").read_text()
        with pytest.raises(TypeError):
            doubled(tmp_path, seeds=(7,), factors=(3, None))
        assert (tmp_path / "doubled.csv.part").read_text() == "seed,factor,product\n7,3,21\n"
        assert (tmp_path / "doubled.csv").read_text() == stored
        assert [file.name for file in tmp_path.glob("*.csv")] == ["doubled.csv"]  # what counts as stored
        doubled(tmp_path)
        assert not (tmp_path / "doubled.csv.part").exists()

    @pytest.mark.parametrize(("out", "changes"), [(0, {}), (None, {"factor": 3})])
    def test_what_cannot_work_is_refused_before_the_first_row(self, out, changes, monkeypatch):
        monkeypatch.setattr(record, "STUDIES", {})

        @record.study
        def must_not_run(seed, factors=(2,)):
            raise AssertionError("measured")
            yield

        with pytest.raises(TypeError):
            must_not_run(out, **changes)

    def test_seeds_and_settings_from_the_command_line(self, capsys):
        command = ["study", "debate", "--seeds", "3", "4", "--set", "passages=2"]
        command += ["--set", "forms=('no debate',)"]
        assert main(command) == 0
        head, *printed = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
        assert (head[0], head[-1]) == ("seed", "n")
        assert [(row[0], row[-1]) for row in printed] == [("3", "2"), ("4", "2")]
        assert main([*command, "--set", "size=1"]) == 1
        assert "an unexpected keyword argument 'size'; its settings are (seed: int, passages: int = 200" in (
            capsys.readouterr().err
        )
        assert main([*command, "--data", "pairs.jsonl"]) == 1
        assert "the study 'debate' takes no --data" in capsys.readouterr().err


class TestStored:
    def test_every_stored_table_has_its_study(self):
        assert sorted(file.stem for file in STORED.glob("*.csv")) == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_every_study_is_stored_with_its_manifest(self, name):
        table = load_study(name)
        assert len(table)
        empty = set(table.columns[table.isna().any()])
        assert empty <= MAY_BE_EMPTY.get(name, set())
        read = f" --data {table.attrs['data']}" if "data" in table.attrs else ""
        assert table.attrs["command"] == f"python -m rlhf_helpers study {name}{read}"
        if "seeds" in table.attrs:
            few = {"clip_and_kl": [0, 1, 2], "ability_tax": [0, 1, 2], "method_tuning": [100, 101]}
            few |= {"real_model": [0, 1], "real_reward_model": [0], "real_safety": [0], "real_chatbot": [0]}
            few |= {"length_candidates": [0, 1], "real_preferences": [0]}
            few |= {"own_taste": [100, 101, 102, 103, 104]}
            seeds = few.get(name, [0, 1, 2, 3, 4])
            assert sorted(table.seed.unique()) == table.attrs["seeds"] == seeds
        assert "/" not in json.dumps(table.attrs.get("data", ""))  # a name, never a path of one machine

    def test_a_row_of_the_stored_study_comes_out_again(self):
        """The same on the machine that made it; elsewhere sums are rounded otherwise: a few pairs of 800."""
        again = lesson1.pairs_and_noise(seeds=(0,), sizes=(60,), flips=(0.1,)).agreement[0]
        table = load_study("pairs_and_noise")
        stored = table[(table.seed == 0) & (table.pairs == 60) & (table.flips == 0.1)].agreement.item()
        assert again == pytest.approx(stored, abs=0.005)

    def test_what_a_reward_model_must_reach(self):
        table = load_study("pairs_and_noise")
        most = table[(table.pairs == 2000) & (table.flips == 0)]
        assert most.agreement.min() >= 0.75, "held-out prompts, in the worst of five seeds"
        real_pairs = load_study("real_preferences")
        pretrained = real_pairs[real_pairs.method == "pretrained"]
        assert np.average(pretrained.accuracy, weights=pretrained.n) >= 0.58


class TestSmall:
    """Each study with little data: its columns, and what must hold at any size."""

    def test_noise_is_as_stated(self):
        rows = make_pairs(2000, annotator=lesson1.noisy(0.25), seed=0)
        differ = [row for row in rows if row["chosen_gold"] != row["rejected_gold"]]
        flipped = np.mean([row["chosen_gold"] < row["rejected_gold"] for row in differ])
        assert flipped == pytest.approx(0.25, abs=0.03)

    def test_kinds_and_formats(self):
        kinds = lesson1.model_kinds(seeds=(0,), pairs=24, heldout=60)
        assert set(kinds.kind) == {"basic", "separate", "multi_objective"}
        assert set(kinds.judged_by) == {"gold", "helpfulness", "harmlessness", "honesty"}
        formats = lesson1.label_formats(seeds=(0,), prompts=6, heldout=60)
        assert formats.format.tolist() == ["pairwise", "ranking", "rating"]

    def test_rankings_and_pairs_of_the_same_answers(self):
        sets = lesson1._answer_sets(5, seed=0)
        assert all(len(set(row["responses"])) == 4 for row in sets)
        first, second, *_ = sets[0]["responses"]
        pairs = lesson1.label_pairs([(sets[0]["prompt"], first, second)] * 2, lesson1.STANDARD, seed=0)
        assert [{row["chosen"], row["rejected"]} for row in pairs] == [{first, second}] * 2

    def test_a_budget_is_spent(self):
        table = lesson1.label_budget(seeds=(0,), budget=6, heldout=60).set_index("method").pairs
        # of 60 pairs: 6 labels by people; 3 and 3; 3 by people and 30 by the model; all 60 by the model
        assert table.to_dict() == {"random": 6, "active": 6, "assisted": 33, "AI alone": 60}

    def test_a_candidate_has_a_reward_a_length_and_a_gold_reward(self):
        table = lesson1.length_candidates(seeds=(0,), pairs=16, prompts=2, samples=3)
        assert list(table.columns) == ["seed", "prompt", "reward", "words", "gold"]
        assert table.prompt.tolist() == [0, 0, 0, 1, 1, 1]
        assert table.gold.between(0, 1).all()

    def test_a_taste_is_measured_at_each_number_of_labels(self):
        table = lesson1.own_taste(seeds=(0,), labels=(8, 12), follow=(12,), heldout=20, steps=1)
        accuracies = table[table.measure == "accuracy"].pivot(index="labels", columns="who", values="value")
        assert accuracies.index.tolist() == [8, 12]
        assert accuracies["shorter answer"].nunique() == 1  # the same new pairs for every number
        policies = table[table.measure == "words"].set_index("who").value
        assert policies.index.tolist() == ["start", "best of 8", "RLOO"]

    def test_ensembles_share_their_samples(self):
        table = lesson1.reward_ensembles(seeds=(0,), pairs=16, members=2, prompts=3, samples=256)
        at_one = table[table.n == 1].set_index("method").gold
        assert set(at_one.index) == {"one", "mean", "worst", "variance"}
        assert at_one.nunique() == 1  # best of one answer: any judge


def test_real_preferences_on_made_up_pairs(tiny_llama_dir, tmp_path, capsys):
    settings = RewardSettings(learning_rate=3e-3, epochs=4, batch_size=8, progress=False)
    options = {"folds": 2, "base_model_name": str(tiny_llama_dir), "settings": settings, "max_length": 32}
    table = real_preferences(tmp_path, data=polite_pairs(40), **options)
    told = capsys.readouterr().out
    mean = table.groupby("method")["accuracy"].mean()
    assert mean["shorter answer"] == 0.0  # "no way" is shorter than "thank you"
    assert mean["TF-IDF Bradley-Terry"] == 1.0
    assert mean["pretrained"] >= 0.9
    assert "thank you" not in told  # aggregates only
    assert (tmp_path / "real_preferences.csv").read_text().startswith("seed,method,fold,accuracy,n")
    assert real_preferences(data=polite_pairs(40), **options).equals(table)
