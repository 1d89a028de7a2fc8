"""Intervals against known coverage and scipy, tests against scipy's and sacrebleu's, Holm against statsmodels' rule."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from sacrebleu.significance import PairedTest
from scipy import stats

from lmworks.base.errors import InputError
from lmworks.evaluation.generated import score_generated
from lmworks.evaluation.significance import bootstrap, holm, mcnemar, paired_difference, ratio


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return documents of very different sizes whose bits a byte are about 2: (N, 2)."""
    size = rng.lognormal(5, 0.8, n)
    return np.stack([size * rng.gamma(20, 0.1, n), size], 1)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits, low = np.random.default_rng(0), {"ratio": 0, "mean": 0}, 0
    trials = 250
    for trial in range(trials):
        right = rng.random(150) < 0.8
        a, b = bootstrap(np.stack([right, np.ones(150)], 1), draws=300, seed=trial)
        hits["mean"] += a <= 0.8 <= b
        a, b = bootstrap(draw(rng, 150), draws=300, seed=trial)
        hits["ratio"] += a <= 2.0 <= b
        a, b = bootstrap(draw(rng, 150), level=0.5, draws=300, seed=trial)
        low += a <= 2.0 <= b
    assert 0.90 <= hits["mean"] / trials <= 0.98, hits
    assert 0.90 <= hits["ratio"] / trials <= 0.98, hits
    assert 0.42 <= low / trials <= 0.58, low


def test_an_interval_is_that_of_scipy() -> None:
    values = draw(np.random.default_rng(1), 200)
    ours = bootstrap(values, draws=5000, seed=3)

    def of(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return a.sum(axis) / b.sum(axis)

    theirs = stats.bootstrap((values[:, 0], values[:, 1]), of, paired=True, vectorized=True, method="percentile",
                             n_resamples=5000, rng=4).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)


def test_differences_against_scipys_permutation_test_and_the_false_alarms_they_give() -> None:
    rng = np.random.default_rng(2)
    a = draw(rng, 60)
    b = a.copy()
    b[:, 0] *= rng.normal(1.02, 0.08, 60)
    found = paired_difference(a, b, draws=4000)
    assert found.value == pytest.approx(b[:, 0].sum() / b[:, 1].sum() - a[:, 0].sum() / a[:, 1].sum(), rel=1e-12)
    assert found.low < found.value < found.high
    size = a[:, 1].sum()  # the same for both models: swapping results is swapping bits
    theirs = stats.permutation_test((a[:, 0], b[:, 0]), lambda x, y: (y.sum() - x.sum()) / size,
                                    permutation_type="samples", n_resamples=8000, rng=5).pvalue  # fmt: skip
    assert found.p_randomization == pytest.approx(theirs, abs=0.03)
    assert found.p_bootstrap == pytest.approx(theirs, abs=0.06)
    swapped = paired_difference(b, a, draws=4000)
    assert (swapped.value, swapped.p_randomization) == pytest.approx((-found.value, found.p_randomization))
    alarms = [0, 0]
    for trial in range(300):  # no difference: p below 0.05 in about a twentieth of the trials
        x = np.stack([rng.random(80) < 0.7, np.ones(80)], 1)
        y = np.stack([rng.random(80) < 0.7, np.ones(80)], 1)
        result = paired_difference(x, y, draws=200, seed=trial)
        alarms[0] += result.p_bootstrap < 0.05
        alarms[1] += result.p_randomization < 0.05
    assert all(0.015 <= n / 300 <= 0.10 for n in alarms), alarms


def test_equal_models_differ_by_nothing() -> None:
    a = draw(np.random.default_rng(0), 20)
    found = paired_difference(a, a.copy())
    assert (found.value, found.low, found.high, found.p_bootstrap, found.p_randomization) == (0, 0, 0, 1, 1)
    assert ratio(np.array([[1.0, 4.0]])).tolist() == [0.25]
    with pytest.raises(InputError, match="different examples"):
        paired_difference(a, a[:5])
    with pytest.raises(InputError, match="no example"):
        bootstrap(np.zeros((0, 2)))


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 3), (1, 9), (12, 5), (40, 61), (700, 812), (3000, 3001)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    theirs = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == pytest.approx(theirs, rel=1e-9)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # worked by hand
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


SAID = ["the cat sat on the mat", "a dog barked", "he went home", "rain fell all day long", "no", "the end of it all"]
TRUE = ["the cat sat on a mat", "the dog barked", "he went home", "rain was falling all day", "yes", "the end of all"]


def test_bleu_and_chrf_are_sacrebleus() -> None:
    found = score_generated(SAID, TRUE)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SAID, [TRUE]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SAID, [TRUE]).score)
    assert found["exact_match"] == pytest.approx(1 / 6)
    assert "tok:13a" in found["signatures"]["bleu"]
    low, high = found["intervals"]["bleu"]
    assert 0 <= low < high
    theirs = sacrebleu.BLEU().corpus_score(SAID, [TRUE], n_bootstrap=1000)
    assert (high - low) / 2 == pytest.approx(theirs._ci, rel=0.05)
    assert score_generated(TRUE, TRUE)["bleu"] == pytest.approx(100)
    with pytest.raises(InputError, match="one reference for each text"):
        score_generated(SAID, TRUE[:2])


def test_texts_with_nothing_in_common_with_their_references_have_intervals() -> None:
    for said, true in ((["", "y z q w e"], ["x a b c", "y z q w e"]), (["x"] * 9 + TRUE[:1], ["y"] * 9 + TRUE[:1])):
        found = score_generated(said, true)
        for name in ("bleu", "chrf"):
            low, high = found["intervals"][name]
            assert 0 <= low <= found[name] <= high <= 100 + 1e-9


def test_the_paired_bootstrap_is_sacrebleus() -> None:
    """On a score that is a sum: chrF's parts are sums of n-gram counts."""
    chrf = sacrebleu.CHRF()
    other = [" ".join(reversed(text.split())) for text in SAID]
    test = PairedTest([("a", SAID * 5), ("b", other * 5)], {"chrf": chrf}, [TRUE * 5], test_type="bs", n_samples=1000)
    _, scores = test()
    theirs = next(v for k, v in scores.items() if k.startswith("chrF"))[1].p_value
    parts = [np.array(chrf._extract_corpus_statistics(texts * 5, [TRUE * 5]), float) for texts in (SAID, other)]
    found = paired_difference(parts[0], parts[1], lambda sums: np.array([chrf._compute_f_score(row) for row in sums]))
    assert found.value == pytest.approx(chrf.corpus_score(other, [TRUE]).score - chrf.corpus_score(SAID, [TRUE]).score)
    assert found.p_bootstrap == pytest.approx(theirs, abs=0.03)
