"""The solver of each diffusers scheduler: (process, times, **options) -> Tableau."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from diffsamp import solvers
from diffsamp._core.types import Times, Value
from diffsamp.interop.diffusers import _steps as steps
from diffsamp.processes import Process
from diffsamp.solvers._builder import Point
from diffsamp.tableau import Tableau

__all__ = ["solver_of"]

MakeTableau = Callable[..., Tableau]
Values = Mapping[str, Value]


def _few(values: Values, n: int) -> bool:
    """diffusers lowers the order at the end for few steps only."""
    return bool(values["lower_order_final"]) and n < 15


def _ddim(name: str, values: Values) -> MakeTableau:
    def ddim(
        process: Process, times: Times, *, eta: float = 0.0, compatible: bool = False
    ) -> Tableau:
        if not compatible:
            return solvers.ddim(process, times, eta=eta)
        if eta:
            raise ValueError("`compatible` is here for eta = 0 only.")
        stride = values["num_train_timesteps"] // (len(times) - 1)
        end = process.t_clean if values["set_alpha_to_one"] else 0.0
        return steps.ddim_strided(process, times, stride=stride, end=end)

    return ddim


def _wuerstchen(name: str, values: Values) -> MakeTableau:
    def ddpm(process: Process, times: Times) -> Tableau:
        mean = solvers.ddpm(process, times, variance="learned")
        return steps.with_rows(solvers.ddpm(process, times), mean, [len(times) - 2])

    return ddpm


def _ddpm(name: str, values: Values) -> MakeTableau:
    large = values.get("variance_type") == "fixed_large"
    return partial(solvers.ddpm, variance="large" if large else "small")


def _orders(values: Values, n: int, *, dropped: bool = False) -> list[int]:
    """Orders of DPMSolverMultistep's steps; `dropped`: a last one, of size zero, is left out."""
    most, total = values["solver_order"], n + dropped
    orders = [min(most, k + 1) for k in range(total)]
    few = _few(values, total)
    if few and total > 1:
        orders[-2] = min(orders[-2], 2)
    if few or values.get("euler_at_final") or values.get("final_sigmas_type", "zero") == "zero":
        orders[-1] = 1
    return orders[:n]


def _expect_finite(process: Process, times: Times, algorithm: str) -> None:
    if not algorithm.endswith("++") and process.sigma(times[-1]) == 0:
        raise ValueError(
            f"'algorithm_type' = {algorithm!r} predicts noise, and is not finite at sigma = 0: end "
            "the times above it, such as with times(timesteps=[..]) or n + 1 sigmas."
        )


def _dpmpp(name: str, values: Values) -> MakeTableau:
    algorithm, variant = values["algorithm_type"], values["solver_type"]
    drops = name.startswith("EDM") and values["final_sigmas_type"] == "sigma_min"

    def dpm(process: Process, times: Times) -> Tableau:
        n = len(times) - 1
        _expect_finite(process, times, algorithm)
        orders = _orders(values, n, dropped=drops and n > 1)
        if not algorithm.endswith("++"):
            return steps.dpm_multistep(
                process, times, orders=orders, algorithm=algorithm, variant=variant
            )
        eta = 1.0 if algorithm.startswith("sde") else 0.0
        build = partial(
            solvers.dpmpp, variant=variant, compatible=True, eta=eta, lower_order_final=False
        )
        tableau = build(process, times, order=max(orders))
        for order in range(1, max(orders)):
            rows = [k for k in range(n) if orders[k] == order and k >= order]
            if rows:
                tableau = steps.with_rows(tableau, build(process, times, order=order), rows)
        return tableau

    return dpm


def _cosine(name: str, values: Values) -> MakeTableau:
    return _dpmpp("EDM", {**values, "algorithm_type": "sde-dpmsolver++"})


def _inverse(name: str, values: Values) -> MakeTableau:
    return _dpmpp(name, {**values, "final_sigmas_type": "sigma_min"})


def _singlestep_orders(values: Values, n: int) -> list[int]:
    order, zero = values["solver_order"], values["final_sigmas_type"] == "zero"
    lower = values["lower_order_final"] or zero or n % order != 0
    rise = list(range(1, order + 1))
    if order == 1:
        return [1] * n
    if not lower:
        return rise * (n // order)
    if n % order == 0:
        orders = rise * (n // order - 1) + ([1, 2, 1] if order == 3 else [1, 1])
    else:
        orders = rise * (n // order) + rise[: n % order]
    return [*orders[:-1], 1] if zero else orders


def _singlestep(name: str, values: Values) -> MakeTableau:
    def dpm(process: Process, times: Times) -> Tableau:
        _expect_finite(process, times, values["algorithm_type"])
        return steps.dpm_singlestep(
            process,
            times,
            orders=_singlestep_orders(values, len(times) - 1),
            algorithm=values["algorithm_type"],
            variant=values["solver_type"],
        )

    return dpm


def _unipc(name: str, values: Values) -> MakeTableau:
    def unipc(process: Process, times: Times) -> Tableau:
        build = partial(
            solvers.unipc,
            order=values["solver_order"],
            variant=values["solver_type"],
            lower_order_final=bool(values["lower_order_final"]),
            prediction="data" if values["predict_x0"] else "noise",
        )
        rows = [n + 1 for n in values["disable_corrector"] if 0 <= n < len(times) - 2]
        plain = build(process, times, corrector=False) if rows else None
        tableau = build(process, times)
        return tableau if plain is None else steps.with_rows(tableau, plain, rows)

    return unipc


def _deis(name: str, values: Values) -> MakeTableau:
    def deis(process: Process, times: Times) -> Tableau:
        return solvers.deis(
            process,
            times,
            order=values["solver_order"] - 1,
            variable="log_rho",
            lower_order_final=_few(values, len(times) - 1),
        )

    return deis


def _sa(name: str, values: Values) -> MakeTableau:
    return partial(
        solvers.sa_solver,
        order=values["predictor_order"],
        corrector=values["corrector_order"],
        lower_order_final=bool(values["lower_order_final"]),
        rescale=True,
        tau=lambda t: 1.0 if 200 <= t <= 800 else 0.0,
        tau_at="start",
    )


def _pndm(name: str, values: Values) -> MakeTableau:
    return partial(
        steps.adams_prk,
        prediction=values["prediction_type"],
        skip_prk=bool(values["skip_prk_steps"]),
    )


def _lcm(name: str, values: Values) -> MakeTableau:
    def boundary(s: Point) -> tuple[float, float]:
        scaled = s.t * values["timestep_scaling"]
        return 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)

    return partial(steps.jumps, boundary=boundary)


def _consistency(name: str, values: Values) -> MakeTableau:
    low, data = values["sigma_min"], values["sigma_data"]

    def boundary(s: Point) -> tuple[float, float]:
        # the network's output is EDM's F; what F says of the data is D = skip_0 x + out_0 F
        out = (s.sigma - low) / s.sigma
        skip = data**2 / ((s.sigma - low) ** 2 + data**2)
        return skip - out * data**2 / (s.sigma**2 + data**2), out

    return partial(steps.jumps, boundary=boundary, floor=low, noise_scale=float(values["s_noise"]))


def _cog_dpm(name: str, values: Values) -> MakeTableau:
    def dpm(process: Process, times: Times) -> Tableau:
        build = partial(solvers.dpmpp, eta=1.0, lower_order_final=False)
        tableau = build(process, times, order=2)
        return steps.with_rows(tableau, build(process, times, order=1), [len(times) - 2])

    return dpm


def _flow_match(name: str, values: Values) -> MakeTableau:
    if values.get("stochastic_sampling"):
        return partial(solvers.consistency, rho_min=0.0)
    return solvers.ddim


def _ltx(name: str, values: Values) -> MakeTableau:
    return partial(
        steps.ancestral_flow, eta=float(values["eta"]), noise_scale=float(values["s_noise"])
    )


def _same(function: MakeTableau, **options: Value) -> Callable[[str, Values], MakeTableau]:
    return lambda name, values: partial(function, **options) if options else function


_SOLVERS: dict[str, Callable[[str, Values], MakeTableau]] = {
    "DDIM": _ddim,
    "DDIMParallel": _ddim,
    "DDIMInverse": lambda name, values: partial(
        steps.ddim_forward, prediction=values["prediction_type"]
    ),
    "DDPM": _ddpm,
    "DDPMParallel": _ddpm,
    "UnCLIP": _ddpm,
    "DDPMWuerstchen": _wuerstchen,
    "PNDM": _pndm,
    "IPNDM": _same(steps.ipndm),
    "LCM": _lcm,
    "TCD": _same(steps.tcd),
    "CogVideoXDDIM": _ddim,
    "CogVideoXDPM": _cog_dpm,
    "EulerDiscrete": _same(solvers.euler),
    "EulerAncestralDiscrete": _same(solvers.ddim, eta=1.0),
    "HeunDiscrete": _same(solvers.heun, coordinates="edm"),
    "LMSDiscrete": _same(solvers.deis, order=3, variable="rho"),
    "KDPM2Discrete": _same(solvers.dpm2),
    "KDPM2AncestralDiscrete": _same(solvers.dpm2_ancestral),
    "DPMSolverSDE": _same(solvers.dpmpp_sde),
    "DPMSolverMultistep": _dpmpp,
    "DPMSolverMultistepInverse": _inverse,
    "DPMSolverSinglestep": _singlestep,
    "UniPCMultistep": _unipc,
    "DEISMultistep": _deis,
    "SASolver": _sa,
    "FlowMatchEulerDiscrete": _flow_match,
    "FlowMatchHeunDiscrete": _same(solvers.heun, coordinates="flow", clean_end="euler"),
    "FlowMatchLCM": _same(solvers.consistency, rho_min=0.0),
    "LTXEulerAncestralRF": _ltx,
    "MiniMaxH3": _same(solvers.ddim),
    "EDMEuler": _same(solvers.euler),
    "EDMDPMSolverMultistep": _dpmpp,
    "CosineDPMSolverMultistep": _cosine,
    "SCM": _same(solvers.consistency, rho_min=0.0),
    "CMStochasticIterative": _consistency,
}


def solver_of(name: str, values: Values) -> MakeTableau:
    """The solver of class `name` with these fields."""
    return _SOLVERS[name](name, values)
