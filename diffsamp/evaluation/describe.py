"""What a tableau does at each step, in words and numbers."""

from __future__ import annotations

import dataclasses

import numpy as np

from diffsamp._core.types import Array
from diffsamp.tableau import Tableau

__all__ = ["Description", "describe", "gaussian_spread"]


@dataclasses.dataclass(frozen=True)
class Description:
    """Facts of a tableau of plain numbers; `str` gives them as text.

    Attributes:
      tableau: it.
      rho: (N + 1,) sigma / alpha of u_0 .. u_N.
      shares: (N, N): the next state is made of u_0 and of the data predictions D_0 .. D_n; this is
        the weight of each D_j in what row n adds, as a part of their sum: 1 for a first-order
        method on the diagonal, negative where a method extrapolates. Where they cancel (the second
        stage of a method that stays at its level), parts of the sum of absolute values.
      extrapolation: (N,) sum of the absolute shares: by how much row n enlarges independent errors
        of the predictions at worst; 1 if it only averages.
    """

    tableau: Tableau
    rho: np.ndarray
    shares: np.ndarray
    extrapolation: np.ndarray

    @property
    def widest(self) -> int:
        """The evaluations of the largest wave (`Tableau.waves`)."""
        waves = self.tableau.waves
        return int(np.bincount(waves[waves > 0], minlength=1).max())

    @property
    def idle(self) -> int:
        """Places that stay free if every wave is one call as wide as the widest.

        They cost the device's time and are no evaluations.
        """
        return self.tableau.latency * self.widest - self.tableau.nfe

    def __str__(self) -> str:
        tableau = self.tableau
        kind = "adds noise" if tableau.stochastic else "deterministic"
        name = tableau.name or "tableau"
        lines = [f"{name}: {tableau.nfe} evaluations in {tableau.rows} rows, {kind}"]
        shared = tableau.latency < tableau.nfe
        if shared:
            lines[0] = (
                f"{name}: {tableau.nfe} evaluations in {tableau.latency} waves of at most "
                f"{self.widest} ({self.idle} idle places), {tableau.rows} rows, {kind}"
            )
        if tableau.source:
            lines.append(f"source: {tableau.source}")
        head = (" row", "t", "sigma/alpha", "step", "extrapolation", "what it does")
        wave = "wave " if shared else ""
        lines.append("{:>4} {}{:>10} {:>12} {:>8} {:>14}  {}".format(head[0], wave, *head[1:]))
        for n in range(tableau.rows):
            with np.errstate(divide="ignore", invalid="ignore"):
                step = np.log(self.rho[n]) - np.log(self.rho[n + 1])
            wave = f"{tableau.waves[n]:>4} " if shared else ""
            lines.append(
                f"{n:>4} {wave}{tableau.times[n]:>10.5g} {self.rho[n]:>12.5g} "
                f"{'to 0' if np.isposinf(step) else f'{step:.3f}':>8} "
                f"{self.extrapolation[n]:>14.2f}  {self._words(n)}"
            )
        lines.append(
            "step: how far log-SNR goes. extrapolation: sum of the absolute weights of the "
            "predictions,\n1 if they are only averaged, more if errors of theirs are enlarged."
        )
        return "\n".join(lines)

    def _words(self, n: int) -> str:
        tableau = self.tableau
        if not tableau.evaluates[n]:
            action = "no evaluation"
            return action + (", adds noise" if tableau.c[n] != 0 else ", keeps the state")
        parts = [
            f"{self.shares[n, j]:+.2f} D_{j}"
            for j in range(n, -1, -1)
            if abs(self.shares[n, j]) >= 0.005
        ]
        told = "" if tableau.asked is None else f" (told t = {tableau.asked[n]:.5g})"
        text = "evaluates D_{}{}; moves along {}".format(n, told, " ".join(parts[:5]) or "nothing")
        if len(parts) > 5:
            text += f" and {len(parts) - 5} more"
        if tableau.c[n] != 0:
            text += f"; adds noise of {tableau.c[n]:.3g}"
        return text


def describe(tableau: Tableau) -> Description:
    """Facts of a tableau, to be printed or plotted.

    Args:
      tableau: of plain numbers: not stacked, without axes of the data.

    Raises:
      ValueError: a tableau of other coefficients.
    """
    on_start, on_data, _ = tableau.unroll(prediction="data")
    rows = tableau.rows
    with np.errstate(divide="ignore"):
        rho = np.asarray(tableau.sigma / tableau.alpha)
    shares = np.zeros((rows, rows))
    for n in range(rows):
        # u_{n+1} minus the part of u_n in it: what the row adds of the predictions
        ratio = on_start[n + 1] / on_start[n] if on_start[n] != 0 else 0.0
        added = on_data[n + 1] - ratio * on_data[n]
        total, size = added.sum(), np.abs(added).sum()
        if size > 0:
            shares[n] = added / (total if abs(total) > 1e-3 * size else size)
    return Description(tableau, rho, shares, np.abs(shares).sum(axis=1))


def gaussian_spread(tableau: Tableau, std: Array) -> np.ndarray:
    """How wide a sampler makes Gaussian data, over how wide it is: 1 is exact, below 1 too narrow.

    For data N(0, s^2) the network that knows them says D = alpha s^2 / (alpha^2 s^2 + sigma^2) u,
    so that all states are linear in u_0 and the fresh noises. A direction of real data in which it
    varies by s sees, locally, the same. Levels that the network is told apart from the state's
    (`Tableau.asked`) are not followed.

    Args:
      tableau: of plain numbers; it starts from the exact distribution at its first level.
      std: (n,) standard deviations s of the data, positive.

    Returns:
      (n,) standard deviations of u_N over those of the exact u_N, which has the last row's level.

    Raises:
      ValueError: a tableau of other coefficients.
    """
    on_start, on_data, on_noise = tableau.unroll(prediction="data")
    alpha, sigma = np.asarray(tableau.alpha), np.asarray(tableau.sigma)
    variance = np.asarray(std, np.float64)[:, None] ** 2
    exact = alpha**2 * variance + sigma**2  # (n, N + 1)
    answer = alpha * variance / exact
    rows = tableau.rows
    states = np.zeros((rows + 1, len(variance), 1 + rows))  # weights of u_0 and of every noise
    said = np.zeros((rows, len(variance), 1 + rows))
    for n in range(rows + 1):
        states[n, :, 0] = on_start[n]
        states[n, :, 1:] = on_noise[n]
        states[n] += np.einsum("j,jsk->sk", on_data[n, :n], said[:n])
        if n < rows:
            said[n] = answer[:, n, None] * states[n]
    made = states[-1, :, 0] ** 2 * exact[:, 0] + (states[-1, :, 1:] ** 2).sum(axis=1)
    return np.sqrt(made / exact[:, -1])
