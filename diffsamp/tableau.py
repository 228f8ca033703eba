"""`Tableau`: a sampler as arrays.

Every sampler that is linear in the network's outputs is an instance of

    u_{n+1} = sum_{i<p} a[n,i] u_{n-i}  +  sum_{j<q} b[n,j] m_{n-j}  +  c[n] z_n,    n = 0 .. N-1

(plus d[n], a constant, for the few samplers that know something of the data's mean), with u_0 =
x_T, u_N the sample, z_n ~ N(0, I) and m_n the network's prediction at (u_n, t_n): the combination
target[n,0] x_0 + target[n,1] eps of what it says about data and noise. In numerical analysis this
is a general linear method. A row with evaluates[n] False makes no evaluation; its m_n is 0.

A tableau is built on the host in float64 and checks itself: when the network always answers the
true x_0, row n must give mean alpha_n x_0 and standard deviation sigma_n. That is a necessary
condition for any consistent sampler, deterministic or not, and a wrong coefficient breaks it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

import jax
import numpy as np

from diffsamp._core.checks import expect_choice, expect_int
from diffsamp._core.files import read_json, write_atomically
from diffsamp._core.numeric import is_concrete
from diffsamp._core.types import Array, PyTree, Times, Value

__all__ = ["Tableau"]

_FORMAT = "diffsamp.tableau"
_VERSION = 1
_ARRAYS = ("times", "alpha", "sigma", "target", "a", "b", "c", "evaluates")
_OPTIONAL = ("d", "asked")


@dataclasses.dataclass(frozen=True, eq=False)
class Tableau:
    """The arrays of a sampler with N rows, p past states and q past outputs.

    Build with `Tableau.create` (checked) or a function of `diffsamp.solvers`. All arrays are
    pytree leaves and may be traced, vmapped and differentiated. `name` and `source` are labels
    for people: they are not part of the pytree, so a transformation such as `jax.tree.map`
    returns a tableau without them, and two tableaux of one shape share a compiled program.

    A trailing axis of size batch on every array but `evaluates` (see `Tableau.stack`) gives each
    sample of the batch a sampler of its own. The coefficients alone may have trailing axes that
    broadcast against the state, the batch axis (of size 1) included: one number per pixel is
    (1, height, width, channels).

    Attributes:
      times: (N + 1,) the process's time of u_0 .. u_N.
      alpha: (N + 1,) signal coefficients there.
      sigma: (N + 1,) noise standard deviations there.
      target: (N, 2) weights of (x_0, eps) in the prediction the row wants: (1, 0) data, (0, 1)
        noise.
      a: (N, p) weights of the past states, newest first.
      b: (N, q) weights of the past outputs, newest first.
      c: (N,) weight of the fresh noise.
      evaluates: (N,) bool, whether the row calls the network at u_n.
      name: what it is, for people.
      source: where it comes from (paper, equation), for people.
      d: (N,) constant added by each row, or None for none: with axes of the data a field.
      asked: (N,) conditioning times: what the network is told in place of the state's own time, in
        the process's time; or None. The state, and how the answer is read, stay those of the level.
      padded: made by `pad` to share a program with others, which therefore keeps its branches
        around the network and the noise; no part of the pytree either.
    """

    times: Times
    alpha: Array
    sigma: Array
    target: Array
    a: Array
    b: Array
    c: Array
    evaluates: Array
    name: str = ""
    source: str = ""
    padded: bool = False
    d: Array = None
    asked: Array = None

    @classmethod
    def create(
        cls,
        *,
        times: Times,
        alpha: Array,
        sigma: Array,
        target: Array,
        a: Array,
        b: Array,
        c: Array = None,
        evaluates: Array = None,
        d: Array = None,
        asked: Array = None,
        name: str = "",
        source: str = "",
        check: str = "full",
    ) -> Tableau:
        """A tableau from host arrays, validated.

        Args:
          times: (N + 1,).
          alpha: (N + 1,).
          sigma: (N + 1,).
          target: (N, 2).
          a: (N, p).
          b: (N, q).
          c: (N,); None: zeros.
          evaluates: (N,); None: every row.
          d: (N,); None: no constants. The check does not know them.
          asked: (N,); None: the network is told the state's own time. The check, in which it is
            always right, does not see it.
          name: for people.
          source: for people.
          check: "full": mean and standard deviation of every row as the module says; "mean": only
            the mean (samplers that add more or less noise on purpose); "none": shapes and
            finiteness only (learned samplers).

        Raises:
          ValueError: shapes that do not agree, values that are not finite, or a row that is not
            consistent, which is named.
        """
        expect_choice(check, "check", ("full", "mean", "none"))
        arrays = {
            "times": times,
            "alpha": alpha,
            "sigma": sigma,
            "target": target,
            "a": a,
            "b": b,
        }
        arrays = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
        rows = arrays["times"].shape[0] - 1 if arrays["times"].ndim else 0
        if rows < 1:
            raise ValueError(
                "a tableau needs at least one row: `times` must have shape (N + 1,) with N >= 1; "
                f"got shape {arrays['times'].shape}."
            )
        arrays["c"] = np.zeros(rows) if c is None else np.asarray(c, np.float64)
        arrays["evaluates"] = np.ones(rows, bool) if evaluates is None else np.asarray(evaluates)
        _check_shapes(arrays, rows)
        if d is not None:
            d = np.asarray(d, np.float64)
            field = d.shape[:2] == (rows, 1)  # axes of the data, after a batch axis of 1
            if not field and d.shape not in ((rows,), arrays["c"].shape):
                raise ValueError(
                    f"`d` must have shape ({rows},), that of `c`, or ({rows}, 1, ..) with axes of "
                    f"the data; got {d.shape}."
                )
            if not np.all(np.isfinite(d)):
                raise ValueError("`d` must be finite.")
        if asked is not None:
            asked = np.asarray(asked, np.float64)
            expected = (rows, *arrays["times"].shape[1:])
            if asked.shape != expected or not np.all(np.isfinite(asked)):
                raise ValueError(
                    f"`asked` must be finite times of shape {expected}, one a row; got "
                    f"{asked if asked.shape == expected else asked.shape}."
                )
        tableau = cls(**arrays, d=d, asked=asked, name=name, source=source)
        if check != "none":
            tableau.check(std=check == "full")
        return tableau

    # -- facts ------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """N: rows, whether or not they evaluate."""
        return int(np.shape(self.a)[0])

    @property
    def p(self) -> int:
        """How many past states a row may use."""
        return int(np.shape(self.a)[1])

    @property
    def q(self) -> int:
        """How many past outputs a row may use."""
        return int(np.shape(self.b)[1])

    @property
    def nfe(self) -> int:
        """Number of network evaluations: the rows that make one, counted."""
        self._expect_concrete("nfe")
        return int(np.sum(np.asarray(self.evaluates)))

    @property
    def waves(self) -> np.ndarray:
        """(N,) int, when each row can ask at the earliest: 1, 2, ..; 0 if it makes no evaluation.

        Row n needs the answer of row j if coefficients that are not 0 lead from m_j to u_n, and
        rows that need none of each other's can be asked together (`parallel.sample_waves`). It is
        read from the table as it is: weights that would cancel in the unrolled form, up to
        rounding, still count.
        """
        self._expect_concrete("waves")
        a, b, asks = (
            np.any(np.asarray(v != 0).reshape(*np.shape(v)[:axes], -1), axis=-1)
            for v, axes in ((self.a, 2), (self.b, 2), (self.evaluates, 1))
        )
        ready = np.zeros(self.rows + 1, int)  # u_n follows from the answers of so many waves
        wave = np.zeros(self.rows, int)
        for n in range(self.rows):
            wave[n] = ready[n] + 1 if asks[n] else 0
            states = [ready[n - i] for i in range(min(self.p, n + 1)) if a[n, i]]
            answers = [wave[n - j] for j in range(min(self.q, n + 1)) if b[n, j]]
            ready[n + 1] = max(states + answers, default=0)
        return wave

    @property
    def latency(self) -> int:
        """Network calls in sequence if every wave is one call; `nfe` is what they cost."""
        return int(self.waves.max(initial=0))

    @property
    def stochastic(self) -> bool:
        """Whether any row adds fresh noise, and a key is therefore needed."""
        self._expect_concrete("stochastic")
        return bool(np.any(np.asarray(self.c) != 0))

    def _expect_concrete(self, what: str) -> None:
        if not is_concrete(self):
            raise TypeError(
                f"`tableau.{what}` is not known inside a traced function: read it from the "
                "tableau outside `jit`."
            )

    def check(self, *, std: bool = True) -> None:
        """Check the necessary condition of the module docstring, in float64 on the host.

        For x_0 constant and u_0 = alpha_0 x_0 + sigma_0 eps, every u_n is a combination of x_0,
        eps and the fresh noises; its x_0 part must be alpha_n and the norm of the rest sigma_n.

        Args:
          std: also check the standard deviation, not only the mean.

        Raises:
          ValueError: naming the first row that fails, with what it gives.
        """
        self._expect_concrete("check")
        if np.ndim(self.times) != 1:
            raise ValueError("check the tableaux before stacking them.")
        if np.ndim(self.a) != 2:
            raise ValueError("coefficients with axes of the data cannot be checked this way.")
        data, noise, _ = self._propagate(std=std)
        scale = np.hypot(self.alpha, self.sigma)
        mean_error = np.abs(data - self.alpha) / scale
        std_error = np.abs(noise - self.sigma) / scale
        error = np.maximum(mean_error, std_error) if std else mean_error
        if np.any(error > 1e-8):
            row = int(np.argmax(error > 1e-8))
            raise ValueError(
                f"row {row - 1} of tableau {self.name!r} is not consistent: for a network that "
                f"always answers the true x_0 it gives {data[row]:.9g} x_0 with standard deviation "
                f"{noise[row]:.9g}, not alpha = {self.alpha[row]:.9g} and sigma = "
                f'{self.sigma[row]:.9g}. Correct its coefficients, or pass check="none" to '
                "Tableau.create for a learned sampler."
            )

    def _propagate(self, *, std: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What every u_n is if the network says x_0: its x_0 part and its noise's std, (N + 1,).

        And its noise, (N + 1, N + 1): the part of the start's own and of every row's.

        Each row is judged on states that are right: what it gives is recorded, then replaced by
        what it should have given. Otherwise its rounding, which a noise prediction divides by a
        small sigma and multiplies by a large one, would be taken for a wrong coefficient later.
        """
        rows = self.rows
        data, noise = np.zeros(rows + 1), np.zeros((rows + 1, rows + 1))
        out_data, out_noise = np.zeros(rows), np.zeros((rows, rows + 1))
        found = np.zeros((2, rows + 1))
        data[0], noise[0, 0] = self.alpha[0], self.sigma[0]
        found[:, 0] = self.alpha[0], self.sigma[0]
        for n in range(rows):
            if self.evaluates[n]:
                w0, w1 = self.target[n]
                out_data[n] = w0
                if w1 != 0:
                    # eps as the network would infer it: (u - alpha x_0) / sigma; at sigma = 0 it
                    # is the one before
                    k = n - int(np.argmax(self.sigma[n::-1] > 0))
                    out_noise[n] = w1 * noise[k] / self.sigma[k]
            for i in range(min(self.p, n + 1)):
                data[n + 1] += self.a[n, i] * data[n - i]
                noise[n + 1] += self.a[n, i] * noise[n - i]
            for j in range(min(self.q, n + 1)):
                data[n + 1] += self.b[n, j] * out_data[n - j]
                noise[n + 1] += self.b[n, j] * out_noise[n - j]
            noise[n + 1, n + 1] += self.c[n]
            size = np.linalg.norm(noise[n + 1])
            found[:, n + 1] = data[n + 1], size
            data[n + 1] = self.alpha[n + 1]
            if std:
                right = self.sigma[n + 1] / size if size > 0 else 0.0
                noise[n + 1] *= right if np.isfinite(right) else 0.0
        return found[0], found[1], noise

    # -- shapes -----------------------------------------------------------------------------------

    def pad(self, rows: int | None = None, p: int | None = None, q: int | None = None) -> Tableau:
        """The same sampler with more rows and columns, so that several share one program.

        Added rows keep the state and skip the network; added columns are zero.

        Args:
          rows: number of rows, at least the present one; None: the present one.
          p: columns of `a`, likewise.
          q: columns of `b`, likewise.

        Raises:
          ValueError: a size below the present one.
        """
        rows = expect_int(self.rows if rows is None else rows, "rows", at_least=self.rows)
        p = expect_int(self.p if p is None else p, "p", at_least=self.p)
        q = expect_int(self.q if q is None else q, "q", at_least=self.q)
        self._expect_concrete("pad")
        extra = rows - self.rows
        dead = np.zeros((extra, *np.shape(self.evaluates)[1:]), bool)

        def repeat_last(array: np.ndarray) -> np.ndarray:
            return np.concatenate([array, np.repeat(array[-1:], extra, axis=0)])

        def widen(array: np.ndarray, columns: int, keep: bool) -> np.ndarray:
            wide = np.zeros((rows, columns, *array.shape[2:]))
            wide[: self.rows, : array.shape[1]] = array
            if keep:
                wide[self.rows :, 0] = 1.0
            return wide

        return dataclasses.replace(
            self,
            times=repeat_last(self.times),
            alpha=repeat_last(self.alpha),
            sigma=repeat_last(self.sigma),
            target=repeat_last(self.target),
            a=widen(self.a, p, keep=True),
            b=widen(self.b, q, keep=False),
            c=np.concatenate([self.c, np.zeros((extra, *np.shape(self.c)[1:]))]),
            evaluates=np.concatenate([self.evaluates, dead]),
            d=self.d
            if self.d is None
            else np.concatenate([self.d, np.zeros((extra, *np.shape(self.d)[1:]))]),
            asked=self.asked if self.asked is None else repeat_last(self.asked),
            padded=True,
        )

    @staticmethod
    def pad_together(tableaux: Sequence[Tableau]) -> list[Tableau]:
        """Pad several tableaux to the smallest common shape."""
        if not tableaux:
            raise ValueError("`tableaux` must hold at least one tableau.")
        sizes = {key: max(getattr(t, key) for t in tableaux) for key in ("rows", "p", "q")}
        return _alike([t.pad(**sizes) for t in tableaux])

    @staticmethod
    def stack(tableaux: Sequence[Tableau]) -> Tableau:
        """One tableau in which sample i of the batch follows tableaux[i].

        Every sample has its own times, coefficients and number of evaluations; the network is
        called with a vector of times. A row calls it as long as any sample's tableau does.
        """
        padded = Tableau.pad_together(tableaux)
        if any(np.ndim(t.d) > 1 for t in padded if t.d is not None):
            raise ValueError("tableaux with constants shaped like the data cannot be stacked.")
        stacked: dict[str, PyTree] = {
            key: np.stack([getattr(t, key) for t in padded], axis=-1)
            for key in (*_ARRAYS, *_OPTIONAL)
            if getattr(padded[0], key) is not None
        }
        return Tableau(**stacked, name=" | ".join(t.name for t in tableaux))

    def then(self, other: Tableau) -> Tableau:
        """This sampler, followed by `other` from the level where this one ends.

        Raises:
          ValueError: `other` starts at another level.
        """
        if not np.allclose(
            [self.alpha[-1], self.sigma[-1]], [other.alpha[0], other.sigma[0]], rtol=1e-9, atol=0
        ):
            raise ValueError(
                f"the second tableau must start where the first ends, t = {self.times[-1]:g}; it "
                f"starts at t = {other.times[0]:g}."
            )
        size = {"p": max(self.p, other.p), "q": max(self.q, other.q)}
        first, second = _alike([self.pad(**size), other.pad(**size)])
        joined: dict[str, PyTree] = {
            key: np.concatenate(
                [
                    getattr(first, key),
                    getattr(second, key)[1 if key in ("times", "alpha", "sigma") else 0 :],
                ]
            )
            for key in (*_ARRAYS, *_OPTIONAL)
            if getattr(first, key) is not None
        }
        name = " then ".join(part for part in (self.name, other.name) if part)
        source = "; ".join(dict.fromkeys(s for s in (self.source, other.source) if s))
        return Tableau(**joined, name=name, source=source)

    def unroll(self, *, prediction: str = "target") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The sampler without recursion, u = A x_T + B m + C z.

        Args:
          prediction: "target": m_n is what the row asks the network for; "data": m_n is its data
            prediction at (u_n, t_n), whatever the row asks for.

        Returns:
          A of shape (N + 1,), B and C of shape (N + 1, N): weights of x_T, of every output and of
          every fresh noise in u_0 .. u_N. B and C are strictly lower triangular.

        Raises:
          ValueError: coefficients with axes of the data, or tableaux stacked per sample.
        """
        expect_choice(prediction, "prediction", ("target", "data"))
        self._expect_concrete("unroll")
        if np.ndim(self.times) != 1 or np.ndim(self.a) != 2:
            raise ValueError("only a tableau of plain numbers can be unrolled.")
        if self.d is not None:
            raise ValueError("a tableau with constants (`d`) cannot be unrolled.")
        rows = self.rows
        full, outputs = np.zeros((rows + 1, 1 + 2 * rows)), np.zeros((rows, 1 + 2 * rows))
        full[0, 0] = 1.0
        for n in range(rows):
            # m_n = w_0 D_n + w_1 (u_n - alpha_n D_n) / sigma_n
            w_0, w_1 = self.target[n] if prediction == "data" and self.evaluates[n] else (1.0, 0.0)
            outputs[n, 1 + n] = w_0
            if w_1 != 0:
                if self.sigma[n] == 0:
                    raise ValueError(
                        f"row {n} of tableau {self.name!r} asks the network at sigma = 0, where "
                        "its answer does not follow from a data prediction. Build it with "
                        'clean_end="euler".'
                    )
                outputs[n] += w_1 / self.sigma[n] * full[n]
                outputs[n, 1 + n] -= w_1 * self.alpha[n] / self.sigma[n]
            for i in range(min(self.p, n + 1)):
                full[n + 1] += self.a[n, i] * full[n - i]
            for j in range(min(self.q, n + 1)):
                full[n + 1] += self.b[n, j] * outputs[n - j]
            full[n + 1, 1 + rows + n] += self.c[n]
        dead = np.flatnonzero(~np.asarray(self.evaluates))
        full[:, 1 + dead] = 0.0  # rows without an evaluation say 0
        return full[:, 0], full[:, 1 : 1 + rows], full[:, 1 + rows :]

    # -- files ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Value]:
        """Plain lists and strings, as written to a file."""
        self._expect_concrete("to_dict")
        arrays = {key: np.asarray(getattr(self, key)).tolist() for key in _ARRAYS}
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "name": self.name,
            "source": self.source,
            "nfe": self.nfe,
            **arrays,
            **{
                key: np.asarray(value).tolist()
                for key in _OPTIONAL
                if (value := getattr(self, key)) is not None
            },
        }

    @classmethod
    def from_dict(cls, data: Value, *, where: str = "the tableau") -> Tableau:
        """The inverse of `to_dict`; shapes, finiteness and the NFE are checked.

        Raises:
          ValueError: anything missing or inconsistent, in words.
        """
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ValueError(
                f'{where} is not a diffsamp tableau: it must say "format": "{_FORMAT}".'
            )
        if data.get("version") != _VERSION:
            raise ValueError(
                f"{where} has version {data.get('version')!r}; this diffsamp reads version "
                f"{_VERSION}. Install the diffsamp that wrote it, or a newer one."
            )
        missing = [key for key in (*_ARRAYS, "nfe") if key not in data]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}.")
        try:
            tableau = cls.create(
                **{key: data[key] for key in _ARRAYS if key != "evaluates"},
                evaluates=np.array(data["evaluates"], dtype=bool),
                **{key: data.get(key) for key in _OPTIONAL},
                name=str(data.get("name", "")),
                source=str(data.get("source", "")),
                check="none",
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where} is corrupt: {error}") from error
        if tableau.nfe != data["nfe"]:
            raise ValueError(
                f'{where} is corrupt: it says "nfe": {data["nfe"]}, its rows evaluate '
                f"{tableau.nfe} times."
            )
        return tableau

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tableau as readable JSON (float64 values exactly), atomically."""
        data = self.to_dict()
        # one row of an array per line: readable, and small diffs
        lines = []
        for key, value in data.items():
            if isinstance(value, list) and value and isinstance(value[0], list):
                body = ",\n    ".join(json.dumps(row) for row in value)
                lines.append(f"  {json.dumps(key)}: [\n    {body}\n  ]")
            else:
                lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        write_atomically(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tableau:
        """Read what `save` wrote.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is not a tableau, or is corrupt; the message says where.
        """
        return cls.from_dict(read_json(path), where=os.fspath(path))

    def __repr__(self) -> str:
        label = self.name or "Tableau"
        if not is_concrete(self) or not isinstance(self.evaluates, np.ndarray):
            return f"<{label}: traced, shape {np.shape(self.a)}, {np.shape(self.b)}>"
        return f"<{label}: {self.nfe} NFE, {self.rows} rows, p = {self.p}, q = {self.q}>"


jax.tree_util.register_dataclass(
    Tableau,
    data_fields=[*_ARRAYS, *_OPTIONAL],
    meta_fields=[],
    drop_fields=["name", "source", "padded"],
)


def _alike(tableaux: Sequence[Tableau]) -> list[Tableau]:
    """The same, with constants or conditioning times in all if in any."""
    has = {key: any(getattr(t, key) is not None for t in tableaux) for key in _OPTIONAL}
    tail = next((np.shape(t.d)[1:] for t in tableaux if t.d is not None), ())
    defaults = {
        "d": lambda t: np.zeros((t.rows, *tail)),
        "asked": lambda t: np.asarray(t.times)[:-1],
    }
    alike = []
    for tableau in tableaux:
        missing: dict[str, PyTree] = {
            key: defaults[key](tableau)
            for key in _OPTIONAL
            if has[key] and getattr(tableau, key) is None
        }
        alike.append(dataclasses.replace(tableau, **missing))
    return alike


def _check_shapes(arrays: dict[str, np.ndarray], rows: int) -> None:
    tail = arrays["times"].shape[1:]
    expected = {
        "times": (rows + 1, *tail),
        "alpha": (rows + 1, *tail),
        "sigma": (rows + 1, *tail),
        "target": (rows, 2, *tail),
        "c": (rows, *tail),
    }
    # the coefficients may have axes of the data, whose first is the batch axis
    inner = arrays["a"].shape[2:]
    if not tail and inner[:1] == (1,):
        tail = inner
        expected["c"] = (rows, *tail) if arrays["c"].ndim > 1 else (rows,)
    for key in ("a", "b"):
        shape = arrays[key].shape
        if len(shape) != 2 + len(tail) or shape[0] != rows or shape[1] < 1 or shape[2:] != tail:
            raise ValueError(f"`{key}` must have shape ({rows}, columns >= 1); got {shape}.")
    for key, shape in expected.items():
        if arrays[key].shape != shape:
            raise ValueError(f"`{key}` must have shape {shape}; got {arrays[key].shape}.")
    evaluates = arrays["evaluates"]
    if evaluates.dtype != bool or evaluates.shape not in ((rows,), (rows, *tail)):
        raise ValueError(
            f"`evaluates` must be booleans of shape ({rows},); got {evaluates.dtype} of shape "
            f"{evaluates.shape}."
        )
    for key, array in arrays.items():
        if not np.all(np.isfinite(array)):
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"`{key}` must be finite; got {array[where]} at {where}.")
    if np.any(arrays["sigma"] < 0) or np.any(arrays["alpha"] < 0):
        raise ValueError("`alpha` and `sigma` must not be negative.")
