"""Evaluates a MOSS-VL checkpoint with lmms-eval, by the arguments of lmms-eval:

    pip install . lmms-eval
    python examples/lmms_eval_adapter.py --model moss_vl --model_args pretrained=CHECKPOINT --batch_size 8 --tasks mme

Other `model_args` are media options: fps=2, num_frames=32, max_pixels=200704, ...
"""

from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor


SAMPLING = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class MossVL(lmms):
    is_simple = False  # tasks give conversations

    def __init__(self, pretrained="checkpoints/moss-vl-nano", batch_size=8, device=None, dtype="auto", **media):
        super().__init__()
        media.pop("max_batch_size", None)  # of batches that lmms-eval makes
        self.batch_size, self.media = int(batch_size), media
        self.processor = MossVLProcessor.from_pretrained(pretrained)
        options = {"dtype": dtype, "device_map": "auto" if device is None else device}
        self.model = MossVLForConditionalGeneration.from_pretrained(pretrained, **options)

    def generate_until(self, requests) -> list[str]:
        """The answers, cut off before the first of the texts in `until`."""
        queries = [self.query(*request.args) for request in requests]
        stream = self.model.stream_batch(self.processor, queries, batch_size=self.batch_size)
        answers = [result["text"] for result in stream.results()["results"]]
        return [cut(answer, request.args[2].get("until")) for answer, request in zip(answers, requests, strict=True)]

    def query(self, context, doc_to_messages, options, doc_id, task, split) -> dict:
        """The query of one document. The conversation holds the context already."""
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        options = {name: value for name, value in options.items() if name in SAMPLING and value is not None}
        if not options.get("temperature", 1):
            options = {name: options[name] for name in options if name not in ("temperature", "top_p", "top_k")}
            options["do_sample"] = False
        return {
            "messages": ChatMessages(messages=messages).to_hf_messages(),
            "media_kwargs": dict(self.media),
            "generate_kwargs": options,
        }

    def loglikelihood(self, requests):
        raise NotImplementedError("this adapter takes tasks that generate (output_type: generate_until)")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("this adapter takes tasks with one round (output_type: generate_until)")


def cut(answer: str, until) -> str:
    ends = [until] if isinstance(until, str) else until or []
    return min((answer.split(end)[0] for end in ends if end), key=len, default=answer).strip()


if __name__ == "__main__":
    from lmms_eval.__main__ import cli_evaluate

    MODEL_REGISTRY_V2.register_manifest(ModelManifest("moss_vl", chat_class_path=f"{__name__}.MossVL"))
    cli_evaluate()
