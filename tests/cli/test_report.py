"""The report: spectra with a known answer, and adapters whose effect is known by construction."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_null
from lora_null.covariances import Covariances
from lora_null.evaluation import report


def covariances_with(eigenvalues, tokens=1000, seed=0):
    """One matrix with the given spectrum in a random basis; returns ``(covariances, basis ascending)``."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=torch.float64))
    C = (Q * eigenvalues) @ Q.T
    name = "model.layers.0.self_attn.q_proj"
    groups = {name: (name, "model.layers.0.self_attn.k_proj")}
    return Covariances({name: (C + C.T) / 2}, groups, {name: tokens}), Q


class TestSpectrum:
    def test_figures_of_a_known_spectrum(self):
        spectrum = [1.0, 2.0, 8.0, 9.0, 16.0, 64.0]
        covariances, _ = covariances_with(spectrum, tokens=11)
        (row,) = report.spectrum_report(covariances, 2, progress=False)
        assert (row.layers, row.d, row.tokens) == (2, 6, 11)
        assert row.null_energy == pytest.approx(3 / 100, rel=1e-10)
        assert row.gap == pytest.approx(4, rel=1e-10)
        assert row.condition == pytest.approx(64, rel=1e-10)
        assert row.knee == 5 and row.against_energy is None and row.generalisation is None
        p = [math.sqrt(value) for value in spectrum]
        p = [value / sum(p) for value in p]
        assert row.effective_rank == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-10)

    def test_singular_covariance_has_infinite_condition_and_json_has_no_infinity(self):
        covariances, _ = covariances_with([0.0, 0.0, 0.0, 1.0, 2.0])
        name = next(iter(covariances))
        exact = Covariances({name: torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0]))}, {name: (name,)}, {name: 5})
        rows = report.spectrum_report(exact, 2, progress=False)
        assert rows[0].condition == math.inf and rows[0].null_energy == 0
        assert next(report.rows_as_dicts(rows))["condition"] is None

    @pytest.mark.parametrize("r", [0, 6, 7])
    def test_rank_out_of_range(self, r):
        covariances, _ = covariances_with([1.0] * 6)
        with pytest.raises(ValueError, match="expected 1 <= r < 6"):
            report.spectrum_report(covariances, r, progress=False)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=12), st.floats(0.1, 10))
    def test_effective_rank_is_between_one_and_n_and_has_no_scale(self, values, scale):
        sigma = torch.tensor(values, dtype=torch.float64)
        rank = report.effective_rank(sigma)
        assert 1 - 1e-9 <= rank <= len(values) + 1e-9
        assert report.effective_rank(scale * sigma) == pytest.approx(rank)
        assert report.effective_rank(torch.ones_like(sigma)) == pytest.approx(len(values))


class TestRowSpaceEnergy:
    def test_one_in_the_null_space_whatever_the_basis(self):
        covariances, Q = covariances_with([1.0, 2.0, 3.0, 50.0, 60.0, 70.0])
        C = covariances[next(iter(covariances))]
        mixing = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert report.row_space_energy(mixing @ Q[:, :3].T, C) == pytest.approx(1, rel=1e-9)

    def test_top_directions(self):
        covariances, Q = covariances_with([1.0, 2.0, 3.0, 50.0, 60.0, 70.0])
        C = covariances[next(iter(covariances))]
        assert report.row_space_energy(Q[:, 4:].T, C) == pytest.approx(130 / 3, rel=1e-9)

    def test_dependent_rows_count_once(self):
        covariances, Q = covariances_with([1.0, 2.0, 3.0, 50.0, 60.0, 70.0])
        C = covariances[next(iter(covariances))]
        doubled = torch.cat([Q[:, :2].T, 0.5 * Q[:, :2].T])
        assert report.row_space_energy(doubled, C) == pytest.approx(1, rel=1e-9)

    def test_empty_null_space(self):
        C = torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0]))
        eye = torch.eye(4)
        assert report.row_space_energy(eye[:2], C) == 1
        assert report.row_space_energy(eye[2:], C) == math.inf


class TestAdapter:
    @pytest.fixture
    def trained(self, calibrated, tmp_path):
        model, covariances = calibrated
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4, lora_alpha=8), progress=False)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(parameter)
        lora_null.save_adapter(model, tmp_path / "adapter")
        return model, covariances, tmp_path / "adapter"

    def test_norm_and_response_equal_the_dense_update(self, trained):
        model, covariances, path = trained
        summary, rows = report.adapter_report(path, covariances, progress=False)
        assert summary["r"] == 4 and summary["layers"] == 14 and summary["train"] == "b_in_basis"
        assert summary["parameters"] == sum(row.r * (row.d + row.m) for row in rows)
        for row in rows:
            layer = model.get_submodule(row.name)
            update = (layer.scaling * layer.lora_B.weight @ layer.lora_A.weight).detach().double()
            C = covariances[row.name].double()
            assert row.norm == pytest.approx(float(update.norm()), rel=1e-5)
            response = (update @ C @ update.T).trace() * row.d / (update.norm() ** 2 * C.trace())
            assert row.response == pytest.approx(float(response), rel=1e-3)
            assert row.row_energy == pytest.approx(1, abs=1e-2)
            assert row.response < 0.5

    def test_without_covariances(self, trained):
        _, rows = report.adapter_report(trained[2], progress=False)
        assert all(row.row_energy is None and row.response is None for row in rows)
        json.dumps(list(report.rows_as_dicts(rows)), allow_nan=False)

    def test_plain_peft_adapter_with_scaling(self, llama, tmp_path):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / "plain")
        summary, rows = report.adapter_report(tmp_path / "plain", progress=False)
        assert summary["train"] is None and summary["written_by"] is None
        layer = model.get_submodule(f"base_model.model.{rows[0].name}")
        assert rows[0].norm == pytest.approx(float(layer.get_delta_weight("default").detach().norm()), rel=1e-5)

    def test_covariances_of_another_model(self, trained):
        covariances, _ = covariances_with([1.0, 2.0, 3.0])
        with pytest.raises(ValueError, match="another model"):
            report.adapter_report(trained[2], covariances, progress=False)

    def test_not_an_adapter(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not an adapter folder"):
            report.adapter_report(tmp_path, progress=False)
