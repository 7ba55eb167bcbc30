"""Law 8: alpha 0 is the identity, alpha 1 the donor, everything else bit-equal; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import toy
from quaver import blend, cli
from quaver.blend import Donor, Recipe
from quaver.checkpoint import Checkpoint
from quaver.errors import CheckpointError, RecipeError
from quaver.provenance import File

KINDS = ("gate", "up", "down")
CHANGES = {"num_hidden_layers": 28, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
           "num_key_value_heads": 1, "head_dim": 32}  # fmt: skip


def ffn(layer, kind, prefix="talker.model."):
    return f"{prefix}layers.{layer}.mlp.{kind}_proj.weight"


def donor_of(source, path, prefix="model.", change=lambda tensors: None):
    """A language model with random weights of the talker's shapes, in two files as the large ones come."""
    torch.manual_seed(7)
    n_layers = source.config.talker_config.num_hidden_layers
    tensors = {
        ffn(i, kind, prefix): torch.randn(source.specs[ffn(i, kind)].shape).to(torch.bfloat16)
        for i in range(n_layers)
        for kind in KINDS
    }
    tensors[f"{prefix}embed_tokens.weight"] = torch.randn(10, 4)
    change(tensors)
    path.mkdir()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, path / file)
    index = {"weight_map": {name: file for file, some in parts.items() for name in some}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return Donor.open(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """28 layers, as the published talkers have."""
    return Checkpoint.open(toy.checkpoint(tmp_path_factory.mktemp("blend") / "tts", **CHANGES))


@pytest.fixture
def donor(source, tmp_path):
    return donor_of(source, tmp_path / "llm")


@pytest.mark.parametrize("method", ["lerp", "slerp"])
def test_the_ends_are_the_talker_and_the_donor_and_84_tensors_move(source, donor, tmp_path, method):
    before = dict(source.tensors())
    for alpha in (0.0, 1.0):
        report = blend.blend(source, donor, tmp_path / f"{alpha}", Recipe(alpha, method=method, force=True))
        after = dict(Checkpoint.open(tmp_path / f"{alpha}").tensors())
        assert len(report.changes) == 84
        blended = {change.name for change in report.changes}
        assert blended == {ffn(i, kind) for i in range(28) for kind in KINDS}
        assert list(after) == list(before)
        for name, tensor in after.items():
            expected = before[name]
            if alpha and name in blended:
                theirs = name.replace("talker.model.", "model.")
                expected = blend.read_tensor(donor.specs[theirs], theirs).to(tensor.dtype)
            assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name


def test_a_small_share_moves_along_the_line_in_float32(source, donor, tmp_path):
    shares = blend.layer_shares("0-1=0.05, 27=0.01,1=0")
    assert shares == {0: 0.05, 1: 0.0, 27: 0.01}
    report = blend.blend(source, donor, tmp_path / "out", Recipe(0.03, shares))
    before, after = dict(source.tensors()), dict(Checkpoint.open(tmp_path / "out").tensors())
    for change in report.changes:
        layer = int(change.name.split(".")[3])
        assert change.alpha == {0: 0.05, 1: 0.0, 27: 0.01}.get(layer, 0.03)
        theirs = change.name.replace("talker.model.", "model.")
        ours, other = before[change.name].float(), blend.read_tensor(donor.specs[theirs], theirs).float()
        expected = (ours + change.alpha * (other - ours)).to(before[change.name].dtype)
        torch.testing.assert_close(
            after[change.name], expected, rtol=1e-6 if ours.dtype == expected.dtype else 0.01, atol=1e-6
        )
        assert change.moved == pytest.approx(float((after[change.name].float() - ours).norm() / ours.norm()), rel=1e-3)
    step = Checkpoint.open(tmp_path / "out").provenance.steps[-1]
    assert step.tool == "blend"
    assert step.result["n_tensors"] == 84
    ours, theirs = step.parents
    assert (ours.name, theirs.name) == ("tts", "llm")
    assert set(theirs.files) == {"model-1.safetensors", "model-2.safetensors"}
    assert all(File.of(donor.path / name) == file for name, file in theirs.files.items())
    assert (tmp_path / "out" / "speech_tokenizer" / "config.json").exists()


def test_an_arc_keeps_lengths_that_a_line_shortens():
    torch.manual_seed(0)
    ours, theirs = torch.randn(64, 64), torch.randn(64, 64)
    theirs *= ours.norm() / theirs.norm()
    assert float(blend._slerp(ours, theirs, 0.5).norm()) == pytest.approx(float(ours.norm()), rel=1e-4)
    assert float(blend._lerp(ours, theirs, 0.5).norm()) < 0.8 * float(ours.norm())
    torch.testing.assert_close(blend._slerp(ours, 2 * ours, 0.25), 1.25 * ours)


def test_a_pattern_chooses_and_one_that_names_nothing_is_an_error(source, donor, tmp_path):
    report = blend.blend(source, donor, tmp_path / "out", Recipe(tensors="*.layers.1?.mlp.down_proj.weight"))
    assert {change.name for change in report.changes} == {ffn(i, "down") for i in range(10, 20)}
    with pytest.raises(RecipeError, match="no tensor of the 84"):
        blend.blended(source, donor, Recipe(tensors="*.down"))


def test_shares_that_make_speech_without_end_must_be_forced():
    for wrong in ({"alpha": 0.1}, {"layers": {3: 0.5}}):
        with pytest.raises(RecipeError, match="never stop.*--force"):
            Recipe(**wrong)
        Recipe(**wrong, force=True)
    for alpha in (-0.01, 1.01, float("nan")):
        with pytest.raises(RecipeError, match="from 0"):
            Recipe(alpha, force=True)
    for text in ("3", "5-2=0.1", "a=0.1", "1=2=3"):
        with pytest.raises(RecipeError, match="names no layers"):
            blend.layer_shares(text)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.pop("model.layers.5.mlp.up_proj.weight"), "layers.5.mlp.up_proj.weight is missing"),
        (lambda t: [t.pop(n) for n in list(t) if ".27." in n], "27 decoder layers and the talker .* 28"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(64, 40)}), r"\[64, 40\], \[64, 32\] is"),
        (lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(64, 32).int()}), "plain weights"),
        (lambda t: [t.pop(n) for n in list(t) if "mlp" in n], "no decoder with gate"),
        (lambda t: t.update({"visual.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)}), "more than one decoder"),
    ],
)  # fmt: skip
def test_a_donor_that_does_not_fit_is_named_before_anything_is_written(source, tmp_path, change, match):
    with pytest.raises(CheckpointError, match=match):
        blend.blend(source, donor_of(source, tmp_path / "llm", change=change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_donors_nan_is_named_and_leaves_nothing(source, tmp_path):
    def spoil(tensors):
        tensors["model.layers.20.mlp.up_proj.weight"][1, 1] = float("nan")

    with pytest.raises(CheckpointError, match=r"layers\.20\.mlp\.up_proj\.weight has values that are not finite"):
        blend.blend(source, donor_of(source, tmp_path / "llm", change=spoil), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llm"]


def test_another_talker_is_a_donor_too_and_a_quantized_one_is_not(source, tmp_path):
    other = toy.checkpoint(tmp_path / "other", seed=1, **CHANGES)
    assert Donor.open(other).prefix == "talker.model."
    with pytest.raises(CheckpointError, match="quantized"):
        donor_of(
            source, tmp_path / "awq", change=lambda t: [
                t.update({n.replace("weight", "qweight"): t.pop(n)}) for n in list(t) if "mlp" in n
            ],
        )  # fmt: skip


def test_the_verb(capsys, source, donor, tmp_path):
    def run(*arguments):
        code = cli.run(["blend", str(source.path), "--donor", str(donor.path), *map(str, arguments)])
        return code, capsys.readouterr()

    code, printed = run("-o", tmp_path / "out", "--json", "--layers", "0=0")
    assert code == 0
    told = json.loads(printed.out)
    assert told["n_tensors"] == 84
    assert sum(t["moved"] == 0 for t in told["tensors"]) == 3
    assert 0 < told["share"] < 1
    code, printed = run("-o", tmp_path / "more", "--alpha", "0.2")
    assert code == 2
    assert "never stop" in printed.err
    code, printed = run("-o", tmp_path / "out")
    assert code == 2
    assert "exists already" in printed.err
    code, printed = run("-o", tmp_path / "some", "--tensors", "*.up_proj.weight")
    assert code == 0
    assert "28 tensors blended" in printed.err
