"""llama.cpp's convert_hf_to_gguf.py, told the pre-tokenizer of a tokenizer that its list of hashes does not know.

python llamacpp_convert.py LLAMA_CPP_FOLDER PRE MODEL --outfile OUT.gguf --outtype f32
"""

from __future__ import annotations

import sys
from pathlib import Path

folder, pre = Path(sys.argv[1]), sys.argv[2]
sys.path[:0] = [str(folder), str(folder / "gguf-py")]
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[3:]]

import convert_hf_to_gguf  # noqa: E402
from conversion import base  # noqa: E402

base.TextModel.get_vocab_base_pre = lambda *_: pre
convert_hf_to_gguf.main()
