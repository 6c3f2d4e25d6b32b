"""The convergence study trains its arms, reports and draws them."""

import json

import pytest
import torch
import yaml

from benchmarks import results as results_module


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "RESULTS", tmp_path)
    return tmp_path


def test_convergence_compares_and_draws(tmp_path, results, capsys):
    pytest.importorskip("accelerate")
    from benchmarks.convergence import plot, study

    sizes = {"scales": [64], "eval_size": 64, "max_size": 64}
    settings = yaml.safe_load(study.SCENES.read_text())
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(settings | sizes))
    arguments = ["--config", str(tmp_path / "small.yaml"), "--scenes", "4", "--val-scenes", "2",
                 "--epochs", "1", "--evaluate-every", "1", "--head-epochs", "1", "--repeats", "1",
                 "--folder", str(tmp_path / "runs"), "--output", "trial"]  # fmt: skip
    assert study.main(arguments) == 0
    content = json.loads((results / "trial.json").read_text())
    arms = {row["arm"]: row for row in content["rows"]}
    assert len(arms) == 7
    assert arms["paper"]["curve"] == arms["conditional"]["curve"]
    # Without the focal prior the first class loss is far larger.
    assert arms["transformers"]["first class loss"] > 3 * arms["paper"]["first class loss"]
    assert arms["new head, zero bias"]["first class loss"] > 3
    assert study.main([*arguments, "--report", "--comparisons", "attention"]) == 0
    assert len(json.loads((results / "trial.json").read_text())["rows"]) == 3
    capsys.readouterr()
    assert plot.main([str(results / "trial.json")]) == 0
    assert "not within 1 epochs" in capsys.readouterr().out
    assert (results / "trial.png").stat().st_size > 5_000

    wide = [*arguments, "--folder", str(tmp_path / "wide"), "--classes", "91", "--queries", "40"]
    assert study.main([*wide, "--comparisons", "head"]) == 0
    rows = json.loads((results / "trial.json").read_text())["rows"]
    zero_bias = {row["arm"]: row for row in rows}["new head, zero bias"]
    assert zero_bias["first class loss"] > 5 * arms["new head, zero bias"]["first class loss"]


def test_plain_attention_is_that_of_transformers():
    """In eval mode, where transformers has DETR as its authors do."""
    import transformers

    from benchmarks.convergence.plain_detr import PlainDetr, PlainDetrFocal, plain_counterpart
    from cdetr_fast import ConditionalDetrConfig, ConditionalDetrForObjectDetection

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "num_queries": 6, "num_labels": 5}  # fmt: skip
    config = ConditionalDetrConfig(backbone="test_resnet", auxiliary_loss=True, **sizes)
    ours = ConditionalDetrForObjectDetection(config)
    images = torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = False
    for kind, outputs in ((PlainDetr, 6), (PlainDetrFocal, 5)):
        model = plain_counterpart(ours, kind, seed=0).eval()
        with torch.no_grad():
            theirs = transformers.DetrForObjectDetection.forward(model, images, mask)
            got = model(images, mask)
        scores = theirs.logits.softmax(-1)[..., :-1] if outputs == 6 else theirs.logits.sigmoid()
        assert theirs.logits.shape == (2, 6, outputs)
        torch.testing.assert_close(got.logits.sigmoid(), scores)
        torch.testing.assert_close(got.pred_boxes, theirs.pred_boxes)
