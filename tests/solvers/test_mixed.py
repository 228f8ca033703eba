"""Mixed steps: equal to the solvers they are made of, exact budgets, measured order."""

import numpy as np
import pytest
from cases import skewed_mixture, twin

import diffsamp as ds
from diffsamp import schedules, solvers
from diffsamp.solvers import MixedStep, mixed

PROCESSES = [ds.processes.vp_linear(), ds.processes.edm(0.02, 30.0)]
POSTERIOR = skewed_mixture().posterior


def same(one, other, process):
    x = np.linspace(-1.3, 1.1, 5)[:, None] * float(process.prior_std)
    got, want = twin(one, POSTERIOR, x), twin(other, POSTERIOR, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-9)
    assert one.nfe == other.nfe


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    ("step", "other"),
    [
        (MixedStep("data", 1), solvers.ddim),
        (MixedStep("noise", 1), solvers.ddim),
        (MixedStep("rho", 3), lambda p, t: solvers.deis(p, t, order=2, variable="rho")),
        (MixedStep("rho", 4), lambda p, t: solvers.deis(p, t, order=3, variable="rho")),
        (MixedStep("t", 3), lambda p, t: solvers.deis(p, t, order=2)),
        (MixedStep("noise", 2), lambda p, t: solvers.deis(p, t, order=1, variable="log_rho")),
        (MixedStep("adams", 3), lambda p, t: solvers.ipndm(p, t, order=3)),
        (MixedStep("adams", 4), lambda p, t: solvers.ipndm(p, t, order=4)),
        (
            MixedStep("data", 2),
            lambda p, t: solvers.dpmpp(p, t, order=2, variant="heun", lower_order_final=False),
        ),
        (MixedStep("data", 3, scale=0.0), solvers.ddim),
    ],
    ids=lambda v: f"{v.basis} {v.order}" if isinstance(v, MixedStep) else "",
)
def test_one_kind_throughout_is_a_known_solver(process, step, other):
    for final in ("t_min", "clean"):
        times = schedules.logsnr(process, 7, final=final)
        same(mixed(process, times, steps=[step] * 7), other(process, times), process)


def test_two_stages_of_order_one_are_the_midpoint_rule():
    """DPM-Solver-2 with its middle at half the log-SNR (arXiv:2206.00927, algorithm 1)."""
    process = PROCESSES[0]
    times = schedules.logsnr(process, 4, final="t_min")
    ours = mixed(process, times, steps=[MixedStep("noise", 1, stages=2)] * 4)
    full = np.linspace(process.log_snr(times[0]), process.log_snr(times[-1]), 9)
    eight = np.asarray(process.time(full))
    eight[0], eight[-1] = times[0], times[-1]
    same(ours, solvers.dpm_solver(process, eight, order=2, prediction="noise"), process)


def test_orders():
    """Each kind, and a tableau that mixes them, converges at its order on a fixed interval."""
    process = ds.processes.vp_linear()
    x = np.linspace(-1.2, 1.2, 7)[:, None]

    def end(steps, n, t_max=0.6, t_min=0.15):
        times = schedules.logsnr(process, n, t_max=t_max, t_min=t_min, final="t_min")
        return twin(mixed(process, times, steps=steps(n)), POSTERIOR, x)

    exact = end(lambda n: [MixedStep("rho", 4)] * n, 3000)

    def slope(steps):
        coarse, fine = (np.abs(end(steps, n) - exact).max() for n in (40, 80))
        return np.log2(coarse / fine)

    # the first step is of order 1, which limits a multistep method to order 2 as it stands
    assert slope(lambda n: [MixedStep("data", 1)] * n) == pytest.approx(1, abs=0.15)
    assert slope(lambda n: [MixedStep("data", 2)] * n) == pytest.approx(2, abs=0.3)
    assert slope(lambda n: [MixedStep("noise", 1, stages=2)] * n) == pytest.approx(2, abs=0.3)
    # with a start of two stages the corrector raises the order by one
    start = [MixedStep("data", 2, stages=2)] * 2
    plain = slope(lambda n: start + [MixedStep("data", 2)] * (n - 2))
    corrected = slope(lambda n: start + [MixedStep("data", 2, corrector=True)] * (n - 2))
    assert plain == pytest.approx(2, abs=0.3)
    assert corrected > plain + 0.6
    kinds = [
        MixedStep("data", 2),
        MixedStep("noise", 3),
        MixedStep("rho", 2),
        MixedStep("t", 2, corrector=True),
        MixedStep("noise", 1, stages=2),
    ]
    assert slope(lambda n: start + [kinds[i % 5] for i in range(n - 2)]) > 1.6


def test_budget_is_the_sum_of_stages():
    process = PROCESSES[0]
    steps = [
        MixedStep(stages=2),
        MixedStep("rho", 3),
        MixedStep(stages=2, corrector=True),
        MixedStep("adams", 2),
    ]
    tableau = mixed(process, schedules.logsnr(process, 4), steps=steps)
    assert tableau.nfe == 6
    assert (
        mixed(
            ds.processes.flow(),
            schedules.uniform(ds.processes.flow(), 4),
            steps=[MixedStep("rho", 2), *steps[1:]],
        ).nfe
        == 5
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, t: mixed(p, t, steps=[MixedStep()]), "`steps` must be 3, one per step; got 1"),
        (lambda p, t: mixed(p, t, steps=[MixedStep(stages=2)] * 3), "has no middle in log-SNR"),
        (lambda p, t: MixedStep("x0"), "`basis` must be one of 'data'"),
        (lambda p, t: MixedStep(order=5), "`order` must be from 1 to 4"),
        (lambda p, t: MixedStep(stages=3), "`stages` must be from 1 to 2"),
        (lambda p, t: MixedStep(scale=3.0), "`scale` must lie between 0 and 2"),
    ],
)
def test_errors(call, message):
    process = PROCESSES[0]
    with pytest.raises(ValueError, match=message):
        call(process, schedules.logsnr(process, 3))
