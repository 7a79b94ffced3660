import subprocess
import sys


def test_refine_loads_no_torch() -> None:
    code = (
        "import sys, importlib, agnitra_lab.refine.search, agnitra_lab.refine.replay\n"
        "from agnitra_lab.refine.sampler import SAMPLERS\n"
        "for info in SAMPLERS.values(): importlib.import_module(info.module)\n"
        "print({'torch', 'triton', 'pandas', 'plotly', 'cmaes', 'optuna', 'gymnasium', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
