import subprocess
import sys

from conftest import ROOT

NOTEBOOK_WITHOUT_WIDGETS = """
import sys, types

class ZMQInteractiveShell: ...

sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
sys.modules["IPython"] = types.SimpleNamespace(get_ipython=ZMQInteractiveShell)
sys.modules["ipywidgets"] = None
from picogpt_jax.progress import IS_WIDGET, tqdm
print(IS_WIDGET, sum(tqdm(range(4), file=sys.stdout, bar_format="{n_fmt}")))
"""


def test_a_notebook_without_widgets_has_a_bar_of_text_and_no_warning() -> None:
    command = [sys.executable, "-c", NOTEBOOK_WITHOUT_WIDGETS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    assert "4" in done.stdout
    assert done.stdout.endswith("False 6\n")
