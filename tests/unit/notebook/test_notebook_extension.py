from __future__ import annotations

import subprocess
import sys

from agnitra_lab.notebook import load_ipython_extension, unload_ipython_extension

MAGICS = {
    "line": {
        "agnitra_optimize", "agnitra_workbench", "agnitra_compare", "agnitra_report", "agnitra_runs",
        "agnitra_rollback", "agnitra_display", "agnitra_dashboard",
    },
    "cell": {"agnitra_profile"},
}  # fmt: skip


def _ours(ip):
    found = ip.magics_manager.magics
    return {kind: {name for name in found[kind] if name.startswith("agnitra")} for kind in found}


def test_loading_registers_every_magic(shell):
    assert _ours(shell.ip) == MAGICS


def test_unloading_takes_everything_away(shell):
    html = shell.ip.display_formatter.formatters["text/html"]
    shell.ok("%unload_ext agnitra_lab")
    assert _ours(shell.ip) == {"line": set(), "cell": set()}
    assert shell.ip.Completer.custom_matchers == []
    assert not [key for key in html.deferred_printers if key[0].startswith("agnitra_lab")]
    assert not [key for key in shell.ip.display_formatter.ipython_display_formatter.deferred_printers]


def test_unloading_takes_away_formatters_that_were_in_use(modelled):
    modelled.ok("%%agnitra_profile\nmodel(x);")
    assert modelled.ok("agnitra_telemetry").text.count("Agnitra Lab") == 0
    unload_ipython_extension(modelled.ip)
    html = modelled.ip.display_formatter.formatters["text/html"]
    assert not [kind for kind in html.type_printers if kind.__module__.startswith("agnitra_lab")]


def test_loading_twice_registers_once_and_loading_again_after_unloading_works(shell):
    load_ipython_extension(shell.ip)
    assert len(shell.ip.Completer.custom_matchers) == 1
    unload_ipython_extension(shell.ip)
    unload_ipython_extension(shell.ip)
    load_ipython_extension(shell.ip)
    assert _ours(shell.ip) == MAGICS


def test_loading_the_extension_loads_nothing_heavy():
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S\nimport sys\n"
        "ip = S.instance(); ip.run_line_magic('load_ext', 'agnitra_lab')\n"
        "heavy = ('torch', 'triton', 'plotly', 'pandas', 'numpy', 'openai', 'nbformat')\n"
        "print('loaded:', [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "loaded: []" in done.stdout, done.stdout + done.stderr


def test_importing_the_folder_does_not_load_ipython():
    code = "import agnitra_lab.notebook, sys; print('IPython' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_every_magic_explains_itself(shell):
    for name in (*MAGICS["line"], *MAGICS["cell"]):
        method = shell.ip.find_magic(name, "cell") or shell.ip.find_magic(name, "line")
        assert method.__doc__ and len(method.__doc__.strip()) > 40
