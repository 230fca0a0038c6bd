"""The inducing factor and flipout against exact covariances, closed forms and finite differences, in float64."""

import math

import pytest
import torch

from lora_null.bayes.flipout import Flipout
from lora_null.bayes.inducing import Flow, Inducing


def factor(size=(4, 3), inducing=2, seed=0, flow=0.5):
    """An inducing factor away from its start: large diagonals, a wide q, a flow that is no identity."""
    torch.manual_seed(seed)
    part = Inducing(size, inducing=inducing, prior_std=0.7, hidden=5).double()
    with torch.no_grad():
        for raw in (part.d_rows, part.d_columns, part.m):
            raw.normal_()
        part.raw_std.normal_(std=2.0)
        part.raw_rest.fill_(1.5)
        part.flow.second.normal_(std=flow)
        part.flow.bias.normal_(std=flow)
    return part


def with_normals(part, normals):
    """Let the factor take these numbers where it would draw."""
    waiting = list(normals)
    part._normal = lambda size, generator: waiting.pop(0).view(size)
    return part


@pytest.mark.parametrize(("size", "k"), [((4, 3), 2), ((2, 5), 4), ((1, 3), 1)])
def test_the_rest_has_the_covariance_of_a_normal_matrix_given_its_inducing_one(size, k):
    part = factor(size, k)
    lengths = [k * k, size[0] * size[1], k * k, k * size[1]]

    def drawn(normal):
        return with_normals(part, normal.split(lengths)).sample().detach().flatten()

    zero = drawn(torch.zeros(sum(lengths), dtype=torch.float64))
    rows = [row for row in torch.eye(sum(lengths), dtype=torch.float64)[k * k :]]
    linear = torch.stack([drawn(row) - zero for row in rows], 1) / (0.7 * float(part.rest))
    Zr, Zc = part.z_rows.detach(), part.z_columns.detach()
    Kr, Kc = (
        Z @ Z.T + torch.nn.functional.softplus(raw.detach()).square().diag()
        for Z, raw in ((Zr, part.d_rows), (Zc, part.d_columns))
    )
    Z, K = torch.kron(Zr, Zc), torch.kron(Kr, Kc)
    truth = torch.eye(size[0] * size[1], dtype=torch.float64) - Z.T @ torch.linalg.inv(K) @ Z
    torch.testing.assert_close(linear @ linear.T, truth, rtol=1e-6, atol=1e-7)


def test_samples_scatter_around_the_mean_that_stands_for_them():
    part, generator = factor(flow=0.2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([part.sample(generator) for _ in range(2000)])
        mean = part.mean()
        # five standard errors, and what the pairs leave of the flow's curvature
        assert bool(((draws.mean(0) - mean).abs() < 5 * draws.std(0) / 2000**0.5 + 1e-3).all())
        assert torch.equal(part.mean(), mean)
    around = torch.stack([part.draw(generator) for _ in range(200)]).mean(0)
    assert bool((around.abs() < 5 * draws.std(0) / 200**0.5 + 1e-3).all())


def test_a_factor_starts_at_its_start():
    part, start = Inducing((4, 3)), torch.randn(4, 3)
    torch.testing.assert_close(part(start), start, atol=1e-7, rtol=0)


def test_the_flow_is_autoregressive_and_knows_its_determinant():
    part = factor(inducing=4).flow
    u0 = torch.randn(4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda row: part(row[None])[0][0], u0)
    assert torch.equal(jacobian, jacobian.tril()) and bool((jacobian.diagonal() > 0).all())
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], part(u0[None])[1])
    assert jacobian.tril(-1).abs().max() > 0.01
    assert Flow(1, 3)(torch.ones(1, 1))[0].shape == (1, 1)


def test_gradients_of_the_divergence_equal_finite_differences():
    part = factor((2, 5), 3)
    names, values = zip(*part.named_parameters(), strict=True)

    def divergence(*values):
        call = {name: value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Divergence(part), {f"part.{name}": value for name, value in call.items()})

    assert torch.autograd.gradcheck(divergence, [value.detach().requires_grad_() for value in values])


class Divergence(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self):
        return self.part.kl(torch.zeros(()), torch.Generator().manual_seed(3))


def test_the_divergence_is_that_of_normal_distributions():
    """Without a flow both parts are between Gaussians: torch's own closed forms."""
    part = factor(flow=0.0)
    normal = torch.distributions.Normal
    with torch.no_grad():
        wanted = torch.distributions.kl_divergence(normal(part.m, part.std), normal(0.0, torch.ones(()))).sum()
        # of the rest given U both covariances are multiples of one, which may be any
        wanted += 12 * torch.distributions.kl_divergence(normal(0.0, part.rest), normal(0.0, 1.0))
        generator = torch.Generator().manual_seed(0)
        found = torch.stack([part.kl(torch.zeros(()), generator) for _ in range(4000)])
    assert float(found.mean()) == pytest.approx(float(wanted), abs=4 * float(found.std()) / 4000**0.5)


def test_the_divergence_of_a_flow_is_the_integral():
    part, generator = factor(inducing=1, flow=0.8), torch.Generator().manual_seed(0)
    with torch.no_grad():
        grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
        base = torch.distributions.Normal(part.m.item(), part.std.item())
        u, log_det = part.flow(grid[:, None, None])
        density = base.log_prob(grid) - log_det - torch.distributions.Normal(0.0, 1.0).log_prob(u[:, 0, 0])
        integral = torch.trapezoid(base.log_prob(grid).exp() * density, grid)
        rest = 12 * (0.5 * part.rest**2 - part.rest.log() - 0.5)
        found = torch.stack([part.kl(torch.zeros(()), generator) for _ in range(4000)])
    assert float(found.mean()) == pytest.approx(float(integral + rest), abs=4 * float(found.std()) / 4000**0.5)


def test_singular_sides_are_taken_in_float64():
    """A side shorter than k, as every B of rank 8 has: K is singular but for D."""
    torch.manual_seed(0)
    part = Inducing((40, 3), inducing=9)
    assert part.sample().isfinite().all() and part.mean().isfinite().all()
    exact = Inducing((40, 3), inducing=9).double()
    exact.load_state_dict(part.state_dict())
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert float(part.kl(torch.zeros(()), generators[0])) == pytest.approx(
        float(exact.kl(torch.zeros(()), generators[1])), rel=1e-3
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop("m"), "fit one another"),
        (lambda t: t.pop("z_rows"), "fit one another"),
        (lambda t: t.update(m=t["m"][:1]), "fit one another"),
        (lambda t: t.update(m=t["m"] * math.nan), "NaN"),
        (lambda t: t.update(m=t["m"].double()), "fp32"),
        (lambda t: t.update(other=torch.ones(1)), "fit one another"),
    ],
)
def test_a_damaged_file_is_refused(damage, said):
    tensors = Inducing((4, 3)).tensors()
    state = torch.random.get_rng_state()
    assert Inducing.of_tensors(dict(tensors)).shape == (4, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    damage(tensors)
    with pytest.raises(ValueError, match=said):
        Inducing.of_tensors(tensors)


def flipout(rows=3, columns=4, centre=None):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    part = Flipout(weight, centre, 0.2)
    with torch.no_grad():
        part.rho.uniform_(0.5, 1.0)
    return part, weight


def test_tokens_have_independent_noise_of_the_factors_variance():
    part, weight = flipout()
    x = torch.randn(4, dtype=torch.float64)
    found = []
    for _ in range(300):
        part.start_forward(weight)
        with torch.no_grad():
            found.append(part.flipped(x.expand(40, 4)))
    found = torch.stack(found)
    wanted = (part.rho.detach() ** 4 @ x**2).diag()
    flat = found.flatten(0, 1)
    torch.testing.assert_close(flat.T @ flat / len(flat), wanted, rtol=0.1, atol=0.05)
    # two tokens of one forward: one E, other signs
    assert abs(float((found[:, 0] * found[:, 1]).mean())) < 0.1 * float(wanted.diagonal().mean())
    part.end_forward()
    assert part.drawn is None


@pytest.mark.parametrize("centred", [False, True])
def test_the_divergence_of_independent_entries(centred):
    part, weight = flipout()
    centre = torch.ones_like(weight) if centred else None
    part.centre = centre
    normal = torch.distributions.Normal
    q, p = normal(weight, part.rho.detach() ** 2), normal(centre if centred else torch.zeros_like(weight), 0.2)
    assert float(part.kl(weight)) == pytest.approx(float(torch.distributions.kl_divergence(q, p).sum()))
    weight = weight.requires_grad_()

    def divergence(weight, rho):
        return torch.func.functional_call(Call(part), {"part.rho": rho}, (weight,))

    assert torch.autograd.gradcheck(divergence, (weight, part.rho.detach().requires_grad_()))


class Call(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, weight):
        return self.part.kl(weight)
