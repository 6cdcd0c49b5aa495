"""Small tokenizers with the chat templates of model families, and files with given records. No network."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tokenizers import Regex, pre_tokenizers

from nemo_rao.data.encode import load_tokenizer
from nemo_rao.demo.tokenizer_training import train_tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI_3 = (  # an end of turn of its own, and the end of text only where nothing is to follow
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (  # no end of turn at all
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama_3": LLAMA_3, "phi_3": PHI_3, "no_end": NO_END, "plain": None}
EXTRA_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nThen it sleeps.\n\n\n\nWhat is the answer? The answer is 42.",
    "system\nuser\nassistant\nHello, how are you today? I am well, thank you!\n\n",
] * 3


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, folder, 400)
    return folder


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folder: Path) -> dict:
    """name -> a tokenizer with that template; ``own`` is the one the package trains."""
    made = {"own": load_tokenizer(tokenizer_folder)}
    for name, template in TEMPLATES.items():
        tokenizer = load_tokenizer(tokenizer_folder)
        tokenizer.add_tokens(EXTRA_TOKENS, special_tokens=True)
        tokenizer.chat_template = template
        made[name] = tokenizer
    # Llama 3 keeps line breaks together, unlike GPT-2's rule, under which its "\n\n" merges with what follows.
    made["llama_3"]._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\w+| ?[^\s\w]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., str]:
    """Writes records (or raw lines) as JSON Lines and returns the path."""

    def write(records: Iterable[object], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return str(path)

    return write
