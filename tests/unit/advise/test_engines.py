import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from bitwright import catalog
from bitwright.advise.engines import CPU, GPUS, Hardware, engine, engines, gpu, kind_of, kinds, refusal
from bitwright.cli.engines import app, cell
from bitwright.core.layout import ENGINES
from bitwright.core.options import build
from bitwright.engine.plan import make_scheme
from bitwright.engine.recipe import load_recipe, make_recipe
from bitwright.errors import InputError

DOCS = Path(__file__).parents[3] / "docs"
PRESETS = {name: load_recipe(name, {}) for name in catalog.names("presets")}
MORE = [
    *({"layout": "gptq", "method": "rtn", "bits": bits} for bits in (2, 3, 4, 8)),
    *({"layout": "compressed-tensors", "method": "rtn", "bits": bits} for bits in (2, 4, 8)),
    {"layout": "compressed-tensors", "method": "rtn", "bits": 4, "inputs": "int8-token"},
    {"layout": "compressed-tensors", "method": "rtn", "scheme": "microscaling", "scheme_options": {"element": "mxfp8"}},
    {"layout": "bitsandbytes", "method": "rtn", "scheme": "codebook", "scheme_options": {"book": "fp4"}},
]


def parts(recipe):
    layout = build(catalog.load("layouts", recipe.layout), recipe.layout_options, "layout")
    return layout, make_scheme(recipe, layout, torch.bfloat16)


@pytest.mark.parametrize("recipe", [*PRESETS.values(), *map(make_recipe, MORE)], ids=str)
def test_the_table_agrees_with_what_layouts_say(recipe):
    layout, scheme = parts(recipe)
    kind = kind_of(layout, scheme)
    assert kinds()[kind].layout == layout.name
    for name, reason in layout.loads_in(scheme, "llama").items():
        assert engine(name).reading(kind).loads == (reason is None), f"{name}, {kind}: {reason}"


def test_every_kind_is_made_by_some_recipe():
    made = {kind_of(*parts(recipe)) for recipe in [*PRESETS.values(), *map(make_recipe, MORE)]}
    # GGUF files are made by a path of their own, without a scheme for the whole model.
    assert made == set(kinds()) - {"gguf"}


def test_engines_that_layouts_know_say_something_of_every_kind():
    for name in ("vllm", "transformers", "bitwright"):
        assert set(engine(name).reads) == set(kinds())
    assert set(ENGINES) <= set(engines())


def test_every_line_has_a_source_and_pages_named_as_sources_exist():
    for entry in engines().values():
        for line in entry.reads.values():
            assert line.kind in kinds()
            assert line.checked in ("run", "source", "docs")
            assert line.sources
            for source in line.sources:
                assert source.startswith("https://") or (DOCS.parent / source).exists(), source
            if line.checked == "run":
                assert any(not source.startswith("https://") for source in line.sources)


@pytest.mark.parametrize(
    ("name", "kind", "capability", "runs", "native"),
    [
        # The rows of vLLM's table of supported hardware and of its pages on int8 and float8.
        ("vllm", "awq-4", 7.0, False, False),
        ("vllm", "awq-4", 7.5, True, False),
        ("vllm", "gptq-4", 8.0, True, False),
        ("vllm", "ct-w8a8", 7.5, True, True),
        ("vllm", "ct-w8a8", 9.0, True, True),
        ("vllm", "ct-w8a8", 10.0, False, False),
        ("vllm", "ct-fp8", 8.0, True, False),
        ("vllm", "ct-fp8", 8.9, True, True),
        ("vllm", "fp8", 9.0, True, True),
        ("vllm", "ct-nvfp4", 9.0, True, False),
        ("vllm", "ct-nvfp4", 10.0, True, True),
        ("vllm", "ct-mxfp4", 7.5, False, False),
        ("vllm", "ct-mxfp8", 9.0, False, False),
        ("vllm", "gguf", 9.0, False, False),
        ("transformers", "bnb-4", 6.0, True, False),
        ("transformers", "bnb-8", 7.0, False, False),
        ("llamacpp", "gguf", 6.0, True, False),
    ],
)
def test_hardware_decides(name, kind, capability, runs, native):
    hardware = Hardware(name="some GPU", capability=capability)
    line = engine(name).reading(kind)
    assert (line.refused_on(hardware) is None) == runs
    assert runs is False or line.is_native_on(hardware) == native


def test_the_cpu_build_of_vllm_takes_what_interop_says_it_takes():
    taken = {kind for kind in kinds() if engine("vllm").reading(kind).refused_on(CPU) is None}
    assert taken == {"ct-int4", "ct-w4a8", "ct-w8a8", "gptq-4", "awq-4"}


def test_refusal_asks_the_layout_for_details():
    layout, scheme = parts(make_recipe({"layout": "gptq", "method": "rtn", "bits": 4, "group_size": 16}))
    assert "group size 32, 64, 128" in refusal("vllm", layout, scheme)
    assert refusal("gptqmodel", layout, scheme) is None
    layout, scheme = parts(PRESETS["nf4"])
    assert "vllm-bnb-plugin" in refusal("vllm", layout, scheme)
    assert refusal("peft", layout, scheme) is None
    layout, scheme = parts(PRESETS["awq"])
    assert "GPT-2" in refusal("transformers", layout, scheme, model_type="gpt2") or "Conv1D" in refusal(
        "transformers", layout, scheme, model_type="gpt2"
    )
    old = Hardware(name="V100", capability=7.0)
    assert refusal("vllm", layout, scheme, hardware=old) == "from compute capability 7.5 on; V100 has 7.0"


def test_gpus_are_found_by_the_names_people_write():
    for written in ("4090", "RTX 4090", "rtx-4090", "NVIDIA RTX 4090"):
        assert gpu(written)[0].capability == 8.9
    assert gpu("h100")[1] == 80
    with pytest.raises(InputError, match="h100"):
        gpu("voodoo2")
    assert all(5 < capability < 13 for capability, _ in GPUS.values())


def run(capsys, *arguments):
    app(list(arguments), standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_prints_the_matrix_and_pure_json(capsys):
    assert "compressed-tensors" in run(capsys)
    found = json.loads(run(capsys, "--json", "--gpu", "a100"))
    assert {entry["engine"] for entry in found} == set(engines())
    vllm = next(entry for entry in found if entry["engine"] == "vllm")
    lines = {line["kind"]: line for line in vllm["reads"]}
    assert lines["awq-4"]["refused"] is None
    assert "10.0" in lines["ct-mxfp8"]["refused"]
    assert "source: https://docs.vllm.ai" in run(capsys, "--engine", "vllm", "--cpu-only")


@pytest.mark.parametrize(
    "arguments",
    [["--engine", "word"], ["--gpu", "h100", "--cpu-only"], ["--compute-capability", "90"], ["--gpu", "abacus"]],
)
def test_nonsense_is_refused(capsys, arguments):
    with pytest.raises(InputError):
        run(capsys, *arguments)


def test_the_page_shows_the_table_as_it_is():
    page = (DOCS / "engines.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9-]+)` \| (.*) \|$", page, re.MULTILINE)
    shown = {kind: [item.strip() for item in line.split("|")] for kind, line in rows}
    names = [name for name in engines() if name != "bitwright"]
    for kind, name in itertools.product(kinds().values(), names):
        assert shown[kind.name][1 + names.index(name)] == cell(engine(name).reading(kind.name), None), (kind.name, name)
