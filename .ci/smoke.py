"""What a user does in the first minutes, in an environment that has the wheel and nothing else.

python smoke.py README.md, in an empty folder. With the extra `models` it samples the bundled
network too.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import sysconfig
from pathlib import Path


def run(*words: str) -> str:
    """A command of the environment; what it prints."""
    script = Path(sysconfig.get_path("scripts")) / words[0]
    done = subprocess.run([script, *words[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr[-2000:])
    return done.stdout


def main(readme: str) -> None:
    """Everything, in order."""
    import diffsamp as ds

    installed = importlib.metadata.version("diffsamp")
    assert ds.__version__ == installed
    where = Path(str(ds.__file__)).resolve()
    assert Path(sysconfig.get_path("purelib")).resolve() in where.parents, where

    text = Path(readme).read_text(encoding="utf-8")
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(snippet, "README.md", "exec"), {})
    assert ds.search.Plan.load("plan-4.json").nfe == 4

    assert installed in run("diffsamp", "--version")
    assert "unipc3" in run("diffsamp", "list")
    assert "4" in run("diffsamp", "show", "plan-4.json")

    # a plan is read where there is no JAX
    without_jax = (
        "import sys; sys.modules['jax'] = None; import numpy as np;"
        "from diffsamp.interop import numpy as plans;"
        "x = plans.run('plan-4.json', lambda x, t: 0 * x, np.ones((2, 2)));"
        "assert x.shape == (2, 2)"
    )
    subprocess.run([sys.executable, "-c", without_jax], check=True)

    if importlib.util.find_spec("flax") is None:
        try:
            from diffsamp.models import digits
        except ImportError as error:
            words = str(error)
        else:
            words = "no error without flax"
        assert 'pip install "diffsamp[models]"' in words, words
    else:
        import jax
        import numpy as np

        from diffsamp.models import digits

        network = digits.load_digits_model()
        sampler = ds.sampler(network, "ipndm3", nfe=6, schedule="logsnr")
        x = np.asarray(sampler(jax.random.key(0), (4, *digits.IMAGE_SHAPE)))
        assert np.isfinite(x).all()
        assert 0.3 < x.std() < 1.5  # of the data 0.75; of noise 80
    print(f"diffsamp {installed} on Python {sys.version.split()[0]}: the first minutes work")


if __name__ == "__main__":
    main(sys.argv[1])
