import subprocess
import sys


def test_refine_loads_no_torch() -> None:
    code = (
        "import sys, agnitra_lab.refine.search, agnitra_lab.refine.bandit, agnitra_lab.refine.random_search, "
        "agnitra_lab.refine.replay; print({'torch', 'triton', 'pandas', 'plotly'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
