"""`pipeline("image-text-to-text")` with moss-vl-nano: each answer in a batch is that of the query alone."""

import warnings

import pytest
import torch
from conftest import ROOT
from transformers import pipeline


NANO = ROOT / "checkpoints" / "moss-vl-nano"
PHOTO, SAMPLE, VIDEO = (
    str(ROOT / "data" / name) for name in ("example_image.jpg", "sample_a.jpg", "example_video.mp4")
)
QUERIES = [
    ("What color is the star?", PHOTO),
    ("How many objects are there, please?", SAMPLE),
    ("Where is the star?", PHOTO),
]
ANSWERS = ["blue", "3", "top right"]


@pytest.fixture(scope="module")
def pipe():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipeline(
            "image-text-to-text", model=str(NANO), trust_remote_code=True, dtype=torch.float32, device="cpu"
        )


def chat(question, image, **options):
    return [
        {"role": "user", "content": [{"type": "image", "image": image, **options}, {"type": "text", "text": question}]}
    ]


def test_settings_of_the_processor_do_not_affect_the_offline_methods(pipe):
    processor = type(pipe.processor).from_pretrained(
        NANO, grid_name="image_grid_thw", return_cross_attention_mask=False
    )
    answer = pipe.model.offline_image_generate(processor, prompt=QUERIES[0][0], image=PHOTO, max_new_tokens=8)
    assert answer == ANSWERS[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_chats(pipe, batch_size):
    chats = [chat(*query) for query in QUERIES]
    out = pipe(text=chats, max_new_tokens=8, return_full_text=False, batch_size=batch_size)
    assert [one[0]["generated_text"] for one in out] == ANSWERS


def test_images_and_texts(pipe):
    texts, images = ["<|image|>" + text for text, _ in QUERIES], [image for _, image in QUERIES]
    out = pipe(images=images, text=texts, max_new_tokens=8, return_full_text=False)
    assert [one["generated_text"] for one in out] == ANSWERS


def test_options_and_video_of_a_part(pipe):
    """Options of a content part reach the processor; unknown ones are errors."""
    content = [{"type": "video", "video": VIDEO, "nframes": 2}, {"type": "text", "text": "What happens?"}]
    assert pipe(text=[{"role": "user", "content": content}], max_new_tokens=2, return_full_text=False)[0][
        "generated_text"
    ]
    with pytest.raises(ValueError, match="unknown keyword 'max_pixel'; did you mean 'max_pixels'"):
        pipe(text=chat(*QUERIES[0], max_pixel=3), max_new_tokens=2)
