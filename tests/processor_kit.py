"""A processor for tests, and what its tests share."""

import pytest
import torch
from golden_cases import (
    make_processor,
)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|{{ p.type }}|>{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def shared():
    return make_processor(chat_template=CHATML)


@pytest.fixture
def processor(shared):
    """A processor whose settings the test must not change."""
    before = [part.to_json_string() for part in (shared.image_processor, shared.video_processor)]
    yield shared
    assert [part.to_json_string() for part in (shared.image_processor, shared.video_processor)] == before


def tokens(processor, out, row=0) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(out["input_ids"][row])


def learned(processor, text, spans, **media) -> str:
    out = processor(text, labels_spans=spans, return_tensors="pt", **media)
    return processor.decode(out["labels"][out["labels"] >= 0])


def same(a, b) -> bool:
    return all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a.keys() | b.keys()
    )
