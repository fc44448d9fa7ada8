"""Forms of training records: tools, losses of turns, weights, `<image>` and `<video>`, alpaca; and random records in
random forms against an independent renderer."""

import copy
import functools
import json
import random

import pytest
from conftest import ROOT
from test_records import folder, read_one, turns, write  # noqa: F401 - folder is a fixture
from tuning import NANO, load_processor

from moss_vl.training.batches import IGNORED, encode, render
from moss_vl.training.realtime_records import read_stream
from moss_vl.training.record_turns import read_conversation
from moss_vl.training.records import Record, read_records


TEMPLATE = (ROOT / "tests/tool_template.jinja").read_text()


@pytest.fixture(scope="module")
def processor():
    processor = load_processor(NANO)
    processor.chat_template = TEMPLATE
    return processor


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky", "deep": [1, None]}}}


def asked(*middle, **record):
    return {
        "messages": [
            {"role": "user", "content": "Look."},
            *middle,
            {"role": "tool", "content": "blue"},
            {"role": "assistant", "content": "Blue."},
        ],
        **record,
    }


def calling(**keys):
    return {"role": "assistant", "content": "", **keys}


def learned(processor, sample) -> list[str]:
    runs, before = [], False
    for label in sample["labels"].tolist():
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if before else [*runs, [label]]
        before = label != IGNORED
    return [processor.tokenizer.decode(run) for run in runs]


# tools


def test_all_spellings_of_tools_and_calls_are_equal(folder):  # noqa: F811
    expected = read_one(folder, asked(calling(tool_calls=[CALL]), tools=[TOOL]))
    assert expected.tools == [TOOL] and expected.messages[1] == calling(tool_calls=[CALL])
    as_json = {
        "type": "function",
        "function": {**CALL["function"], "arguments": json.dumps({"at": "sky", "deep": [1, None]})},
    }
    sharegpt = [
        {"from": "human", "value": "Look."},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "blue"},
        {"from": "gpt", "value": "Blue."},
    ]
    swift = [
        {"role": "user", "content": "Look."},
        {"role": "tool_call", "content": json.dumps(CALL["function"])},
        {"role": "tool_response", "content": "blue"},
        {"role": "assistant", "content": "Blue."},
    ]
    for record in (
        asked(calling(tool_calls=[CALL["function"]]), tools=json.dumps([TOOL["function"]])),
        asked(calling(tool_calls=json.dumps([as_json])), tools=[json.dumps(TOOL)]),
        asked({"role": "assistant", "tool_calls": [as_json], "content": None}, tools=[TOOL["function"]]),
        {"conversations": sharegpt, "tools": json.dumps([TOOL]), "system": ""},
        {"messages": swift, "tools": json.dumps([TOOL])},
    ):
        assert read_one(folder, record) == expected, record
    two = read_one(folder, {"messages": [swift[0], swift[1], swift[1], *swift[2:]]})
    assert two.messages[1]["tool_calls"] == [CALL, CALL] and len(two.messages) == 4, "calls in a row are one turn"
    assert two.tools is None and read_one(folder, asked(calling(content="x"), tools="[]")).tools is None


def test_calls_are_learned_and_results_are_not(folder, processor):  # noqa: F811
    record = read_one(folder, asked(calling(content="Wait.", tool_calls=[CALL]), tools=[TOOL]))
    sample = encode(record, processor)
    call = '<tool_call>\n{"name": "look", "arguments": {"at": "sky", "deep": [1, null]}}\n</tool_call>'
    assert learned(processor, sample) == [f"Wait.\n{call}<|im_end|>", "Blue.<|im_end|>"]
    text = processor.tokenizer.decode(sample["input_ids"])
    assert '"parameters": {"type": "object"' in text and "<tool_response>\nblue\n</tool_response><|im_end|>" in text
    whole = processor.apply_chat_template(record.messages, tools=record.tools)
    assert sample["input_ids"].tolist() == processor.tokenizer(whole)["input_ids"]


def test_a_template_or_a_stream_without_tools_refuses_them(folder):  # noqa: F811
    plain = load_processor(NANO)
    with pytest.raises(ValueError, match="tools is given, but the chat template does not read it"):
        render(read_one(folder, asked(calling(content="x"), tools=[TOOL])), plain)
    with pytest.raises(ValueError, match="the chat template of the checkpoint does not read tool_calls"):
        render(read_one(folder, asked(calling(tool_calls=[CALL]))), plain)
    with pytest.raises(ValueError, match="tools need the chat template"):
        render(read_one(folder, asked(calling(tool_calls=[CALL]))), plain, template=False)


# losses and weights


def test_turns_with_loss_false_are_not_learned(folder, processor):  # noqa: F811
    first, second = turns("a", "b"), turns("c", "d")
    first[1]["loss"], first[0]["loss"], second[1]["loss"] = False, False, True
    record = read_one(folder, {"messages": [*first, *second]})
    assert [message.get("loss") for message in record.messages] == [False, False, None, None]
    sample, plain = (
        encode(record, processor),
        encode(read_one(folder, {"messages": turns("a", "b", "c", "d")}), processor),
    )
    assert learned(processor, sample) == ["d<|im_end|>"] and sample["input_ids"].equal(plain["input_ids"])
    assert learned(processor, plain) == ["b<|im_end|>", "d<|im_end|>"]
    bare = encode(record, processor, template=False)
    assert learned(processor, bare) == [f"d{processor.tokenizer.eos_token}"]


def test_the_weight_of_a_record(folder, processor):  # noqa: F811
    assert read_one(folder, {"response": "x"}).weight == 1
    record = read_one(folder, {"response": "x", "weight": 3})
    assert record.weight == 3.0 and encode(record, processor)["weight"] == 3.0


# placeholders


def test_tags_stand_for_media_if_there_are_media(folder):  # noqa: F811
    media = {"image": "a.png", "video": ["v.mp4"]}
    expected = read_one(
        folder, {"messages": turns("<|image|>\nA<|video|>", "x"), "images": "a.png", "videos": "v.mp4"}
    )
    assert read_one(folder, {"messages": turns("<image>\nA<video>", "x"), **media}) == expected
    assert read_one(folder, {"prompt": "<image>\nA<video>", "response": "x", **media}) == expected
    words = read_one(folder, {"messages": turns("What does <image> mean? And <video>?", "a tag: <image>")})
    assert words.messages == turns("What does <image> mean? And <video>?", "a tag: <image>")
    other = read_one(folder, {"messages": turns("<image> or <video>?", "x"), "images": "a.png"})
    assert other.messages[0]["content"] == "<|image|> or <video>?", "there is no video"
    clip = {"video_path": "v.mp4", "segments": [[0, 1], [1.5]]}
    for text in ("<video>?", "<video><video>?"):
        assert read_one(folder, {"messages": turns(text, "x"), "videos": clip}).messages[0]["content"] == (
            "<|video|><|video|>?"
        )


def test_alpaca_keys(folder):  # noqa: F811
    expected = read_one(
        folder,
        {
            "messages": [
                {"role": "system", "content": "S"},
                *turns("<|image|>What?", "A star.", "Sure?", "Yes.", "Say\nit", "it"),
            ],
            "images": ["a.png"],
        },
    )
    record = {"instruction": "Say", "input": "it", "output": "it", "system": "S"}
    history = [["What?", "A star."], ["Sure?", "Yes."]]
    assert read_one(folder, record | {"history": history, "images": "a.png"}) == expected
    tagged = [["<image>What?", "A star."], history[1]]
    assert read_one(folder, record | {"history": tagged, "image": "a.png"}) == expected
    for empty in ({"input": ""}, {"input": None}, {"history": []}):
        found = read_one(folder, {"instruction": "Say", "output": "it", **empty})
        assert found.messages == turns("Say", "it")
    assert read_one(
        folder, {"messages": turns("a", "b"), "instruction": "", "output": "", "history": []}
    ).messages == (turns("a", "b"))


BAD = [
    (
        asked(calling(tool_calls=[{"name": "look", "arguments": "{x"}])),
        "turn 1: the arguments of look: '{x' is not JSON",
    ),
    (asked(calling(tool_calls=[{"name": "look", "arguments": 3}])), "the arguments of look must be an object, got 3"),
    (asked(calling(tool_calls=[{"arguments": {}}])), "a tool call must have name and arguments"),
    (asked(calling(tool_calls=[{"name": "look<|im_end|>"}])), "turn 1 holds '<|im_end|>'"),
    (asked(calling(tool_calls=[])), "turn 1, the assistant's, is empty"),
    (asked(calling(content="x"), tools="{"), "tools: '{' is not JSON"),
    (asked(calling(content="x"), tools={"name": "look"}), "tools must be a list of JSON schemas"),
    (asked(calling(content="x"), tools=[{"description": "x"}]), "tool 0 must be {'type': 'function'"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]},
        "turn 1 is a result of a tool",
    ),
    ({"messages": asked(calling(content="x"))["messages"][:3]}, "the last turn is the result of a tool"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}, *turns("a", "b")]},
        "turn 0: tool_calls belongs into a turn of role assistant",
    ),
    ({"conversations": [{"from": "function_call", "value": "look"}]}, "turn 0: 'look' is not JSON"),
    (
        {"messages": [turns("a")[0] | {"loss": True}, *turns("a", "b")]},
        "turn 0: loss is true, but only turns of the assist",
    ),
    (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "loss": 1}]},
        "loss must be true or false, got 1",
    ),
    (
        {"messages": [*turns("a"), {"role": "assistant", "content": "b", "loss": False}]},
        "every turn of the assistant has",
    ),
    ({"response": "x", "weight": 0}, "weight must be a number above 0, got 0"),
    ({"response": "x", "weight": True}, "weight must be a number above 0, got True"),
    ({"response": "x", "weight": float("inf")}, "weight must be a number above 0"),
    (
        {"messages": turns("<image><|image|>", "b"), "images": ["a.png"] * 2},
        "has '<image>' and <|image|>; write one form",
    ),
    ({"messages": turns("<image><|video|>", "b"), "image": "a.png", "video": "v.mp4"}, "has '<image>' and <|video|>"),
    (
        {"messages": turns([{"type": "image", "image": "a.png"}, "<image>?"], "b")},
        "has '<image>' and a part that is a medium",
    ),
    ({"messages": turns("<image><image>", "b"), "images": "a.png"}, "placeholders for 2 images, but images holds 1"),
    (
        {"prompt": "<image>?", "response": "b", "images": "a.png", "videos": "v.mp4"},
        "for 0 videos, but videos holds 1",
    ),
    ({"instruction": "a"}, "a record with instruction needs output; got no output"),
    ({"instruction": "a", "output": " "}, "the output is empty"),
    ({"instruction": "a", "output": "b", "history": [["c"]]}, "history must be a list of [instruction, output]"),
    ({"instruction": "a", "output": "b", "prompt": "c"}, "got prompt, instruction, output"),
    ({"response": "x", "system": "a", "system_prompt": "b"}, "has 'system' and 'system_prompt', which mean the same"),
]


@pytest.mark.parametrize("record, reason", BAD, ids=[reason for _, reason in BAD])
def test_a_bad_record_is_named(folder, record, reason):  # noqa: F811
    with pytest.raises(ValueError) as error:
        read_records(write(folder, record))
    assert reason in str(error.value)


# random records


WORDS = ("red", "star", "two boxes", "at 3.5 s", "Ja, gern.", '{"a": 1}', "<b>", "\u2014 yes")


def random_conversation(rng) -> dict:
    """A conversation in a plain form: system, [(role, text, calls, loss)], tools, number of images."""
    tools = [{**TOOL, "function": {**TOOL["function"], "name": f"tool{i}"}} for i in range(rng.choice((0, 0, 1, 2)))]
    turns_, images = [], 0
    for number in range(rng.randint(1, 3)):
        text = " ".join(rng.choices(WORDS, k=rng.randint(0, 3)))
        if rng.random() < 0.4:
            text, images = rng.choice((f"<I>{text}", f"{text}<I>", f"a <I> b <I> {text}")), images
        turns_.append(("user", text, [], True))
        while tools and rng.random() < 0.4:
            calls = [("tool0", {"at": rng.choice(WORDS), "n": rng.randint(0, 9)}) for _ in range(rng.randint(1, 2))]
            said = rng.choice(("", "Wait."))
            turns_.append(("assistant", said, calls, rng.random() < 0.8))
            turns_ += [("tool", rng.choice(WORDS), [], True) for _ in calls]
        turns_.append(("assistant", rng.choice(WORDS), [], number == 0 or rng.random() < 0.7))
    return {"system": rng.choice(("", "Be short.")), "turns": turns_, "tools": tools}


def pieces_of(conversation) -> list[tuple[str, bool]]:
    """The text of tool_template.jinja as (piece, whether it is learned), without Jinja."""
    pieces, before = [], None
    if conversation["tools"]:
        lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in conversation["tools"])
        head = conversation["system"] + "\n\n" if conversation["system"] else ""
        pieces.append((f"<|im_start|>system\n{head}<tools>{lines}\n</tools><|im_end|>\n", False))
    elif conversation["system"]:
        pieces.append((f"<|im_start|>system\n{conversation['system']}<|im_end|>\n", False))
    for index, (role, text, calls, loss) in enumerate(conversation["turns"]):
        if role == "user":
            pieces.append((f"<|im_start|>user\n{text}<|im_end|>\n", False))
        elif role == "tool":
            following = conversation["turns"][index + 1][0]
            start = "" if before == "tool" else "<|im_start|>user"
            end = "" if following == "tool" else "<|im_end|>\n"
            pieces.append((f"{start}\n<tool_response>\n{text}\n</tool_response>{end}", False))
        else:
            said = [text] * bool(text)
            for name, arguments in calls:
                written = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
                said.append(f"<tool_call>\n{written}\n</tool_call>")
            pieces += [("<|im_start|>assistant\n", False), ("\n".join(said) + "<|im_end|>", loss), ("\n", False)]
        before = role
    return pieces


def written(conversation, rng) -> dict:
    """The conversation as a record, in a form drawn at random."""
    tag = rng.choice(("<image>", "<|image|>"))
    sharegpt = rng.random() < 0.5
    role_key, text_key = ("from", "value") if sharegpt else ("role", "content")
    names = {"user": "human", "assistant": "gpt", "tool": "observation"} if sharegpt else {}
    messages, images = [], 0
    for role, text, calls, loss in conversation["turns"]:
        images += text.count("<I>")
        message = {role_key: names.get(role, role), text_key: text.replace("<I>", tag)}
        calls = [{"name": name, "arguments": arguments} for name, arguments in calls]
        if calls and not text and rng.random() < 0.5:
            message = {role_key: rng.choice(("function_call", "tool_call")), text_key: json.dumps(calls)}
        elif calls:
            message["tool_calls"] = rng.choice(
                (calls, json.dumps(calls), [{"type": "function", "function": call} for call in calls])
            )
        if not loss or (role == "assistant" and rng.random() < 0.3):
            message["loss"] = loss
        messages.append(message)
    record = {rng.choice(("messages", "conversations")): messages}
    if conversation["system"]:
        if rng.random() < 0.5:
            record[rng.choice(("system", "system_prompt"))] = conversation["system"]
        else:
            messages.insert(0, {role_key: "system", text_key: conversation["system"]})
    if conversation["tools"]:
        bare = [tool["function"] for tool in conversation["tools"]]
        record["tools"] = rng.choice(
            (conversation["tools"], bare, json.dumps(bare), [json.dumps(tool) for tool in bare])
        )
    if images:
        record[rng.choice(("image", "images"))] = ["a.png"] * images
    return record


def test_random_records_in_random_forms(folder, processor):  # noqa: F811
    kinds = set()
    for seed in range(60):
        rng = random.Random(seed)
        conversation = random_conversation(rng)
        record = read_one(folder, written(conversation, rng))
        ids, labels = [], []
        for piece, is_learned in pieces_of(conversation):
            tokens = processor.tokenizer(piece.replace("<I>", "<|image_pad|>"))["input_ids"]
            ids += tokens
            labels += tokens if is_learned else [IGNORED] * len(tokens)
        sample = encode(record, processor, max_pixels=4096, min_pixels=1024)
        assert sample["input_ids"].tolist() == ids, f"seed {seed}"
        assert sample["labels"].tolist() == labels, f"seed {seed}"
        messages = [{name: value for name, value in message.items() if name != "loss"} for message in record.messages]
        options = {"tools": record.tools} if record.tools else {}
        whole = processor.apply_chat_template(
            messages, tokenize=True, images=record.images or None, max_pixels=4096, min_pixels=1024, **options
        )
        assert whole[0] == ids, f"seed {seed}"
        kinds.add((bool(record.tools), bool(record.images)))
    assert kinds == {(a, b) for a in (True, False) for b in (True, False)}


STRAY = (
    None,
    True,
    0,
    3.5,
    "",
    "x",
    "<image>",
    "<|video|>",
    "{}",
    "[1]",
    [],
    [None],
    {},
    {"a": 1},
    {"name": "f"},
    "tool",
)


def places_of(value, place=()):
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places_of(one, (*place, key))


def test_whatever_is_wrong_is_a_value_error(folder, processor):  # noqa: F811
    """Random records with one or two values replaced, removed or added."""
    good = bad = 0
    for seed in range(200):
        rng = random.Random(seed)
        record = copy.deepcopy(written(random_conversation(rng), rng))
        for _ in range(rng.randint(1, 2)):
            *parents, last = rng.choice([place for place in places_of(record) if place] or [("id",)])
            node = functools.reduce(lambda value, key: value[key], parents, record)
            change = rng.random()
            if change < 0.6:
                node[last] = copy.deepcopy(rng.choice(STRAY))
            elif change < 0.8 and isinstance(node, dict):
                node[rng.choice(("tools", "history", "output", "weight", "loss", "from"))] = copy.deepcopy(
                    rng.choice(STRAY)
                )
            elif last != "id":
                del node[last]
        try:
            found = Record("here", **vars(read_conversation(record, folder)))
            (read_stream if found.is_stream else render)(found, processor)
            good += 1
        except ValueError:
            bad += 1
    assert good > 20 and bad > 100


EMPTY = {"instruction": "", "input": "", "output": "", "history": [], "conversations": []}


@pytest.mark.parametrize("empty", [EMPTY, EMPTY | {"messages": []}, {"messages": []}])
def test_empty_columns_of_other_forms_are_no_form(empty, tmp_path):
    assert read_conversation({"prompt": "a", "response": "b"} | empty, tmp_path) == read_conversation(
        {"prompt": "a", "response": "b"}, tmp_path
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"weight": 10**400}, "weight must be a number above 0, got .* expected 1e-06 to 1e"),
        ({"weight": 1e39}, "weight must be a number above 0, got .* expected 1e-06 to 1e"),
        ({"weight": 1e-60}, "weight must be a number above 0, got .* expected 1e-06 to 1e"),
        ({"videos": {"video_path": "v.mp4", "segments": [[0, 10**400]]}}, "segments of"),
        ({"response": "a\ud800"}, "response holds .* which is no character"),
    ],
)
def test_numbers_and_characters_that_cannot_be_trained(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_conversation({"prompt": "a", "response": "b"} | wrong, tmp_path)


def test_json_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "deep.jsonl").write_text('{"prompt": "a", "response": ' + "[" * 100000)
    with pytest.raises(ValueError, match="record 0 .*nested too deeply"):
        read_records(tmp_path / "deep.jsonl")
