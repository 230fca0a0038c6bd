"""Advice on covariances made for the purpose: enough and too few tokens, flat and low-rank spectra, other models."""

import json
import math
from dataclasses import asdict

import pytest
import torch

from lora_null.covariances import Covariances
from lora_null.evaluation.advice import advise
from lora_null.evaluation.report import rows_as_dicts, spectrum_report

NAME, D, R = "model.layers.0.mlp.down_proj", 96, 8


def sampled(variances, tokens, seed, **metadata):
    """The covariance of Gaussian rows with these variances along the axes."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, len(variances), generator=generator, dtype=torch.float64) * variances.sqrt()
    return Covariances({NAME: (X.T @ X).float()}, {NAME: (NAME,)}, {NAME: tokens}, metadata)


def read(variances, tokens, r=R, **options):
    halves = (sampled(variances, tokens, seed, **options) for seed in (0, 1))
    (row,) = rows = spectrum_report(next(halves), r, against=next(halves), progress=False)
    return row, advise(rows, r)


STEEP = torch.arange(1, D + 1, dtype=torch.float64) ** -2
FLAT = torch.ones(D, dtype=torch.float64)


def test_the_figures_are_those_of_the_definition():
    first, second = torch.diag(torch.tensor([1.0, 2.0, 3.0, 94.0])), torch.diag(torch.tensor([5.0, 1.0, 4.0, 90.0]))
    halves = [Covariances({"a": C}, {"a": ("a",)}, {"a": tokens}) for C, tokens in ((first, 20), (second, 10))]
    (row,) = spectrum_report(halves[0], 2, against=halves[1], progress=False)
    assert row.null_energy == pytest.approx(0.03) and row.against_energy == pytest.approx(0.06)
    assert row.generalisation == pytest.approx(6 / 5) and row.tokens == 10 and row.knee == 3


def test_enough_tokens():
    row, advice = read(STEEP, 16 * D)
    assert 1 < row.generalisation < 2
    assert not (advice.few_tokens or advice.chance or advice.beyond_knee or advice.no_null_space)
    assert "at least 2 d" in advice.sentences[0] and "the text suffices" in advice.sentences[1]


def test_the_rule_of_two_d_tokens_stands_for_a_gap_below_ten():
    assert 2 < read(STEEP, 2 * D)[0].generalisation < 10
    assert read(STEEP, D)[0].generalisation > 10


def test_too_few_tokens():
    row, advice = read(STEEP, D // 2)
    assert row.null_energy < 1e-6 and row.generalisation > 10
    assert advice.few_tokens == advice.chance == (NAME,)
    assert f"2 d = {2 * D} tokens" in advice.sentences[0] and NAME in advice.sentences[0]
    assert "chance" in advice.sentences[1]


def test_texts_of_different_kind_show_whatever_the_tokens():
    halves = sampled(STEEP, 16 * D, 0), sampled(STEEP.flip(0), 16 * D, 1)
    advice = advise(spectrum_report(halves[0], R, against=halves[1], progress=False), R)
    assert not advice.few_tokens and advice.chance == (NAME,) and "differ in kind" in advice.sentences[1]


def test_a_flat_spectrum_has_no_null_space_though_few_tokens_make_it_look_so():
    row, advice = read(FLAT, 2 * D)
    assert row.null_energy * D / R < 0.2
    assert row.against_energy * D / R == pytest.approx(1, abs=0.1)
    assert advice.no_null_space == (NAME,) and "none to speak of" in advice.sentences[3]
    alone = advise(spectrum_report(sampled(FLAT, 2 * D, 0), R, progress=False), R)
    assert alone.no_null_space == () and "not measured" in alone.sentences[1]


def test_low_rank_inputs_have_a_null_space_that_holds_until_r_passes_it():
    variances = torch.cat([torch.ones(16), torch.zeros(D - 16)]).double()
    row, advice = read(variances, 4 * D)
    assert row.knee == D - 16 and row.against_energy < 1e-6
    assert not (advice.few_tokens or advice.chance or advice.beyond_knee or advice.no_null_space)
    _, beyond = read(variances, 4 * D, r=D - 14)
    assert beyond.beyond_knee == (NAME,) and f"knee is at {D - 16} of {D}" in beyond.sentences[2]


def test_json_holds_rows_and_advice():
    C = torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0]))
    halves = [Covariances({"a": each}, {"a": ("a",)}, {"a": 9}) for each in (C, C.flip(0, 1))]
    rows = spectrum_report(halves[0], 2, against=halves[1], progress=False)
    assert rows[0].generalisation == math.inf
    advice = advise(rows, 2)
    assert advice.chance == ("a",)
    json.dumps([list(rows_as_dicts(rows)), asdict(advice)], allow_nan=False)


def test_what_cannot_be_compared_is_refused():
    first = sampled(STEEP, 200, 0, base_fingerprint="one", data="x")
    C = first[NAME]
    cases = [
        (Covariances({"b": C}, {"b": ("b",)}, {"b": 9}), "do not go together"),
        (Covariances({NAME: C[:-1, :-1]}, {NAME: (NAME,)}, {NAME: 9}), f"d={D} and d={D - 1}"),
        (sampled(STEEP, 200, 1, base_fingerprint="two", data="y"), "other weights"),
        (sampled(STEEP, 200, 1, base_fingerprint="one", data="x"), "the same text"),
    ]
    for against, match in cases:
        with pytest.raises(ValueError, match=match):
            spectrum_report(first, R, against=against, progress=False)
    with pytest.raises(ValueError, match="no rows"):
        advise([], R)
