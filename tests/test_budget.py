"""A budget is never passed, costs as little as its own measure says, and is refused with the numbers."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toy
from quaver import budget, cli, ledger, mixed, validate
from quaver.awq_search import nearest
from quaver.checkpoint import Checkpoint
from quaver.corpus import Item
from quaver.errors import BudgetError, CheckpointError, RecipeError
from quaver.int8 import Int8Weight
from quaver.model.tts import TTS, Utterance
from quaver.recipe import Recipe
from quaver.recipe import settings as settings_of
from quaver.voice import Voice


@pytest.fixture(scope="module")
def items():
    generator = torch.Generator().manual_seed(0)
    voice = Voice("v", torch.randn(128, generator=generator))
    return [
        Item(Utterance(text, "english", voice), torch.randint(0, toy.N_CODES, (12, 16), generator=generator))
        for text in ("one small boat", "the rain has stopped")
    ]


def weighed(folder):
    return ledger.weigh(Checkpoint.open(folder)).total.disk_bytes


@pytest.fixture(scope="module")
def sizes(toy_folder, items, tmp_path_factory):
    """The bytes of the toy kept whole and of the smallest that a budget may choose."""
    out = tmp_path_factory.mktemp("budget") / "least"
    mixed.quantize(toy_folder, out, Recipe(predictor="int4", text_embedding="int8"), calibration=items)
    return weighed(toy_folder), weighed(out)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_what_is_written_fits_and_is_what_was_chosen(toy_folder, items, sizes, tmp_path, share):
    whole, least = sizes
    most = round(least + share * (whole - least))
    chosen, spoken = budget.choose(Checkpoint.open(toy_folder), most, Recipe(), calibration=items)
    assert spoken == items
    report = mixed.quantize(toy_folder, tmp_path / "out", chosen, calibration=spoken)
    assert weighed(tmp_path / "out") == report.tensor_bytes[1] <= most
    n_fixed = report.tensor_bytes[1] - sum(one.n_bytes[one.store] for one in chosen.measured)
    assert n_fixed == whole - sum(one.n_bytes["keep"] for one in chosen.measured)
    step = Checkpoint.open(tmp_path / "out").provenance.steps[-1]
    assert step.recipe["budget_bytes"] == most
    assert step.recipe["measured"] == json.loads(json.dumps([dataclasses.asdict(one) for one in chosen.measured]))
    for one in chosen.measured:
        assert one.block in report.summary()


def test_an_interrupted_run_chooses_again_and_goes_on(toy_folder, items, sizes, tmp_path):
    def interrupt(what, done, total):
        if what == "quantizing layers":
            raise KeyboardInterrupt

    def run(progress=None):
        chosen, heard = budget.choose(Checkpoint.open(toy_folder), sizes[1] + 1, Recipe(), calibration=items)
        return mixed.quantize(toy_folder, tmp_path / "out", chosen, calibration=heard, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)
    assert run().n_resumed == 1


def test_the_smallest_budget_takes_everything_down(toy_folder, items, sizes):
    chosen, _ = budget.choose(Checkpoint.open(toy_folder), sizes[1], Recipe(), calibration=items)
    assert (chosen.talker, chosen.layers, chosen.predictor, chosen.text_embedding) == ("int4", {}, "int4", "int8")


def test_what_fits_nowhere_is_refused_with_the_numbers(toy_folder, sizes):
    checkpoint = Checkpoint.open(toy_folder)
    with pytest.raises(BudgetError, match=f"at its smallest it takes {sizes[1]:,} on disk .talker layers .*all else"):
        budget.choose(checkpoint, sizes[1] - 1, Recipe())
    with pytest.raises(RecipeError, match=f"takes {sizes[0]:,} bytes unquantized, within"):
        budget.choose(checkpoint, sizes[0], Recipe())


def test_a_recipe_says_what_else_is_small(toy_folder, items, sizes, tmp_path):
    # The codec in bfloat16 makes room for a budget below the smallest without it.
    recipe = Recipe(text_embedding="int8", codec_decoder="bfloat16")
    chosen, _ = budget.choose(Checkpoint.open(toy_folder), sizes[1] - 1, recipe, calibration=items)
    assert "text embedding" not in [one.block for one in chosen.measured]
    mixed.quantize(toy_folder, tmp_path / "out", chosen, calibration=items)
    assert weighed(tmp_path / "out") <= sizes[1] - 1


def test_a_recipe_must_leave_the_choice_to_the_budget(toy_folder, tmp_path):
    checkpoint = Checkpoint.open(toy_folder)
    for recipe in (Recipe(predictor="int8"), Recipe(layers={0: "keep"}), Recipe(talker="int8")):
        with pytest.raises(RecipeError, match="take them out of the recipe"):
            budget.choose(checkpoint, 10**6, recipe)
    with pytest.raises(CheckpointError, match="is quantized already"):
        budget.choose(toy.rounded(toy_folder, tmp_path / "int4"), 10**6, Recipe())


def test_blocks_are_measured_one_at_a_time_and_put_back(toy_folder, items):
    tts = TTS.load(toy_folder)
    before = {name: value.clone() for name, value in tts.model.state_dict().items()}
    name = "talker.model.layers.1.mlp.up_proj.weight"
    for store, rounding in (("int8", Int8Weight.nearest), ("int4", nearest)):
        alone = Recipe(talker="keep", layers={1: store})
        with budget.rounded(tts, settings_of(alone, tts.config)):
            after = tts.model.state_dict()
            changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
            assert len(changed) == 7 and all(key.startswith("talker.model.layers.1.") for key in changed)
            assert torch.equal(after[name], rounding(before[name]).dequantize())
        assert all(torch.equal(value, before[key]) for key, value in tts.model.state_dict().items())


def test_the_cost_is_the_divergence_of_whole_frames(toy_folder, items):
    tts = TTS.load(toy_folder)
    checkpoint = Checkpoint.open(toy_folder)
    told = []
    chosen, _ = budget.choose(
        checkpoint, 2_900_000, Recipe(), calibration=items, progress=lambda *event: told.append(event)
    )
    assert told[-1] == ("measuring blocks", 4, 4)
    (predictor,) = [one for one in chosen.measured if one.block == "code predictor"]
    before = [validate.opinion(tts, logits, "cpu") for logits in validate.force(tts, items, lambda *_: None)]
    with budget.rounded(tts, settings_of(Recipe(talker="keep", predictor="int4"), tts.config)):
        after = [validate.opinion(tts, logits, "cpu") for logits in validate.force(tts, items, lambda *_: None)]
    rest = [(a.residual.exp() * (a.residual - b.residual)).sum((1, 2)) for a, b in zip(before, after, strict=True)]
    first = [(a.first.exp() * (a.first - b.first)).sum(1) for a, b in zip(before, after, strict=True)]
    wanted = float(torch.cat(rest).mean() + torch.cat(first).mean())
    assert predictor.kl["int4"] == pytest.approx(wanted, rel=1e-3)
    assert predictor.kl["keep"] == 0 < predictor.kl["int8"] < predictor.kl["int4"]


costs = st.lists(st.tuples(st.integers(2, 50), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None)
@given(costs, st.floats(0, 1))
def test_fit_never_passes_the_budget_and_leaves_no_room_unused(drawn, share):
    n_bytes = [{"keep": 4 * size, "int8": 2 * size, "int4": size} for size, _, _ in drawn]
    kl = [{"keep": 0.0, "int8": low, "int4": low + more} for _, low, more in drawn]
    least, whole = sum(one["int4"] for one in n_bytes), sum(one["keep"] for one in n_bytes)
    most = least + int(share * (whole - least))
    chosen = budget.fit(n_bytes, kl, most)
    total = sum(one[store] for one, store in zip(n_bytes, chosen, strict=True))
    assert total <= most
    for sizes, cost, store in zip(n_bytes, kl, chosen, strict=True):
        for other in sizes:
            assert not (cost[other] < cost[store] and total - sizes[store] + sizes[other] <= most)


def test_fit_takes_what_costs_least_first():
    n_bytes = [{"keep": 40, "int8": 20, "int4": 10}] * 3
    kl = [{"keep": 0.0, "int8": 0.1, "int4": 1.0}, {"keep": 0.0, "int8": 0.01, "int4": 2.0},
          {"keep": 0.0, "int8": 0.2, "int4": 0.21}]  # fmt: skip
    assert budget.fit(n_bytes, kl, 100) == ["keep", "int8", "keep"]
    assert budget.fit(n_bytes, kl, 80) == ["int8", "int8", "keep"]
    best = min(
        (sum(k[s] for k, s in zip(kl, way, strict=True)), way)
        for way in itertools.product(("keep", "int8", "int4"), repeat=3)
        if sum(n[s] for n, s in zip(n_bytes, way, strict=True)) <= 50
    )
    assert tuple(budget.fit(n_bytes, kl, 50)) == best[1] == ("int8", "int8", "int4")


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0.9GB", 900_000_000),
        ("900 MB", 900_000_000),
        ("1GiB", 2**30),
        ("1.5MiB", 3 * 2**19),
        ("1234", 1234),
        ("7kB", 7000),
    ],
)
def test_sizes(text, n_bytes):
    assert budget.size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "0.9 G B", "-1GB", "1TB", "1e9", "0,9GB"])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match="is no size"):
        budget.size(text)


def test_the_verb(toy_folder, sizes, tmp_path, capsys):
    asked = ["quantize", str(toy_folder), "-o", str(tmp_path / "out"), "--samples", "2", "--budget"]
    assert cli.run([*asked, str(sizes[1] - 1)]) == 2
    assert "at its smallest it takes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.run([*asked, f"{sizes[0] / 1e6 - 0.2}MB", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["block"] for one in told["recipe"]["measured"]] == [
        "talker layer 0", "talker layer 1", "code predictor", "text embedding",
    ]  # fmt: skip
