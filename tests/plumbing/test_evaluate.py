"""Claims about the measures: they equal values computed in other ways, and a run is measured the same twice."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from evaluate import Protocol, evaluate, evaluation_id
from parts.metrics import frechet_distance, psnr, ssim
from plumbing.pictures import draw_report


def test_psnr_equals_the_formula_by_hand():
    a = torch.zeros(1, 3, 4, 4)
    b = a.clone()
    b[0, 0, 0, 0] = 0.5  # in [0, 1] an error of 0.25 in one of 48 values
    assert psnr(a, b).item() == pytest.approx(10 * math.log10(1 / (0.25**2 / 48)), abs=1e-4)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    assert psnr(a, b, mask).item() == pytest.approx(10 * math.log10(1 / (0.25**2 / 3)), abs=1e-4)
    assert psnr(a, a).item() == math.inf


def test_ssim_equals_a_loop_over_windows():
    torch.manual_seed(0)
    a = torch.rand(2, 3, 16, 14) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)
    line = np.exp(-(np.arange(11) - 5) ** 2 / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    wanted = []
    for x, y in zip(((a + 1) / 2).double().numpy(), ((b + 1) / 2).double().numpy()):
        scores = []
        for c in range(3):
            for i in range(16 - 10):
                for j in range(14 - 10):
                    p, q = x[c, i:i + 11, j:j + 11], y[c, i:i + 11, j:j + 11]
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    scores.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        wanted.append(np.mean(scores))
    assert ssim(a, b).tolist() == pytest.approx(wanted, abs=1e-8)
    assert ssim(a, a).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("n, m, d", [(200, 150, 5), (4, 6, 10), (30, 3, 8)])  # the last two: covariances of low rank
def test_the_frechet_distance_equals_the_formula_with_eigenvalues(n, m, d):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(n, d)) * np.arange(1, d + 1), rng.normal(size=(m, d)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(wanted, rel=1e-6)
    assert frechet_distance(torch.tensor(a), torch.tensor(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(torch.tensor(a), torch.tensor(a + 2)) == pytest.approx(4 * d, rel=1e-6)


QUICK = Protocol(count=4, steps=2)


@pytest.fixture(scope="module")
def measured(whole_run, tmp_path_factory):
    """A copy of the whole run with its results; -> (folder, what `evaluate` returned)."""
    run = shutil.copytree(whole_run, tmp_path_factory.mktemp("measured") / "run")
    return run, evaluate(run, QUICK)


def test_a_run_measured_twice_gives_the_same_id_and_figures(measured, tmp_path):
    first, run = measured[1], shutil.copytree(measured[0], tmp_path / "run")
    assert {**first, "seconds": 0} == {**evaluate(run, QUICK), "seconds": 0}
    assert evaluation_id(run, QUICK) == first["eval_id"] != evaluation_id(run, Protocol(count=4, steps=2, guidance=2.5))
    content = torch.load(run / "U3.pt", weights_only=True)
    next(iter(content["ema"].values())).add_(1.0)
    torch.save(content, run / "U3.pt")
    assert evaluation_id(run, QUICK) != first["eval_id"]


def test_results_have_every_key_of_the_contract(measured):
    results = json.loads((measured[0] / "results.json").read_text())
    wanted = {"reconstruction": "psnr ssim rfd", "understanding": "overall colour shape size place count relation twins before_t3",
              "generation": "overall single two counting colours position binding held_out knowledge",
              "generation_direct": "overall single held_out knowledge knowledge_p3",
              "editing_direct": "overall hybrid preservation_psnr",
              "editing": "overall add adjust extract replace remove background style hybrid action preservation_psnr"}
    assert {"eval_id", "seed", "seconds", "ablation", *wanted} <= set(results)
    for part, keys in wanted.items():
        assert set(keys.split()) <= set(results[part]), part


def test_the_report_has_its_four_pictures(measured):
    shutil.rmtree(measured[0] / "report", ignore_errors=True)
    assert str(measured[0] / "report" / "summary.png") in draw_report(measured[0])
    assert {path.name for path in (measured[0] / "report").iterdir()} == {"summary.png", "losses.png", "streams.png", "routing.png"}
