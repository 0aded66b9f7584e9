"""The public face, and what importing it does not import."""

import subprocess
import sys

import pytest

import bitwright

PUBLIC = [
    "BitwrightError", "Conversion", "Evaluation", "HubError", "InputError", "NumericError", "OutlierReport", "PlanError", "Recipe",
    "ResourceError", "Result", "ResumeError", "Stopped", "VerifyError", "allocate", "analyze", "collect_imatrix", "convert", "evaluate",
    "from_gguf", "load", "quantize", "to_gguf",
]  # fmt: skip
CODES = {
    "BitwrightError": 1, "InputError": 2, "PlanError": 2, "ResumeError": 2, "VerifyError": 3, "ResourceError": 4,
    "NumericError": 5, "HubError": 6, "Stopped": 75,
}  # fmt: skip


def _python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_public_names_are_pinned_and_all_there():
    assert bitwright.__all__ == PUBLIC
    assert all(getattr(bitwright, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="nonsense"):
        bitwright.nonsense  # noqa: B018


def test_exit_codes_are_pinned():
    assert {name: getattr(bitwright, name).exit_code for name in CODES} == CODES


@pytest.mark.parametrize("code", ["import bitwright", "from bitwright.cli.main import main; main(['--help'])"])
def test_heavy_libraries_wait_until_they_are_needed(code):
    found = _python(f"{code}\nimport sys; print('loaded', *sys.modules)")
    loaded = set(found[found.index("loaded") :])
    assert "bitwright" in loaded
    assert not loaded & {"torch", "transformers", "numba", "numpy", "safetensors", "pydantic"}


def test_plan_imports_no_other_command(llama):
    arguments = ["plan", str(llama), "--group-size", "32", "--json"]
    found = _python(
        f"from bitwright.cli.main import main\nassert main({arguments!r}) == 0\nimport sys; print('loaded', *sys.modules)"
    )
    loaded = {name for name in found[found.index("loaded") :] if name.startswith("bitwright.")}
    assert "bitwright.cli.plan" in loaded
    assert not loaded & {f"bitwright.cli.{name}" for name in ("quantize", "eval", "inspect", "demo")}
    assert "bitwright.kernels.numba_feedback" not in loaded


def test_help_lists_every_command_and_unknown_ones_exit_2(bitwright_cli):
    from bitwright.cli.main import COMMANDS

    code, out, _ = bitwright_cli("--help")
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    for command in COMMANDS:
        code, out, _ = bitwright_cli(command, "--help")
        assert code == 0
        assert "--help" in out
    assert bitwright_cli("nonsense")[0] == 2
    assert bitwright_cli("plan")[0] == 2
    assert bitwright_cli("quantize", "x", "-o", "y", "--resume", "perhaps")[0] == 2


def test_version_is_the_installed_one(bitwright_cli):
    from importlib.metadata import version

    assert bitwright_cli("--version")[:2] == (0, version("bitwright") + "\n")
