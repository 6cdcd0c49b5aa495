"""What templates of published models do to a row: it is trained on whole, or dropped and its cause quoted."""

import copy
import json
import shutil

import hypothesis
import numpy as np
import pytest
import transformers
from hypothesis import strategies as st

from nemo_rao.batch import Response, Row, Sample
from nemo_rao.data.encode import BoundaryError, ContentError, Encoder, end_tokens, inner_ends, load_tokenizer
from nemo_rao.data.tokenizer import save_for_4, written_by_5
from nemo_rao.data.tokens import added_tokens
from nemo_rao.errors import UserError
from tests.engines import needs_transformers_4

HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
R1 = (  # keeps what follows the reasoning
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' + (m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
QWEN_3 = (  # an empty block of thinking before the last answer; renders tools, calls and reasoning
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + ASKED
)
MISTRAL = (  # the system message stands before the last question
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML + ASKED,
    "no_generation_prompt": CHATML,
    "trims": (CHATML + ASKED).replace("m.content", "m.content | trim"),
    "no_system": (CHATML + ASKED).replace("messages %}", "messages if m.role != 'system' %}"),
    "r1": R1,
    "r1_opens_thinking": R1.replace("'<|assistant|>' }}", "'<|assistant|><think>\n' }}"),
    "qwen_3": QWEN_3,
    "mistral": MISTRAL,
    "escapes_tools": (CHATML + ASKED).replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)"),
    "one_call": (CHATML + ASKED).replace(
        "m.content", "(m.tool_calls[0].function | tojson if m.tool_calls else m.content)"
    ),
    "no_end": "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
}
SYSTEM, QUESTION = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}
REASONED = "<think>\ntwo and two\n</think>\n\n4"
PLACE = "data.jsonl line 7"
TOOLS = [{"type": "function", "function": {"name": "add_up", "parameters": {"type": "object", "properties": {}}}}]


def call(name: str = "add_up", **arguments: object) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def encoder(tokenizers):
    """(name of a template, arguments) -> its encoder."""
    made: dict = {}

    def make(name: str, **arguments) -> Encoder:
        key = (name, *arguments.values())
        if key not in made:
            tokenizer = copy.deepcopy(tokenizers["llama_3"])  # which keeps line breaks apart from what follows
            tokenizer.chat_template = TEMPLATES[name]
            made[key] = Encoder(tokenizer, **arguments)
        return made[key]

    return make


def texts(encoder: Encoder, sample: Sample) -> tuple[str, list[str]]:
    return encoder.tokenizer.decode(sample.prompt), [encoder.tokenizer.decode(one) for one in sample.responses]


def row(*answers: str | Response, prompt=(QUESTION,), **fields) -> Row:
    responses = tuple(Response(answer) if isinstance(answer, str) else answer for answer in answers)
    return Row(prompt, responses, PLACE, **fields)


# ----------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize(
    ("template", "given", "lost"),
    [
        ("r1", row("fine", REASONED), r"leaves out a part of response 2: '<think>.ntwo and two.n</think>'. .*verbatim"),
        ("no_system", row("4", prompt=(SYSTEM, QUESTION)), r"leaves out a part of message 1 \(system\): 'Be brief.'"),
        # Its text stands in the header of every message, but not for itself.
        ("no_system", row("4", prompt=({**SYSTEM, "content": "user"}, QUESTION)), r"message 1 \(system\): 'user'"),
        (
            "r1",
            row("4", prompt=(QUESTION, {"role": "assistant", "content": REASONED}, QUESTION)),
            r"message 2 \(assist",
        ),
    ],
)
def test_a_row_of_which_the_template_leaves_out_text_is_dropped_and_the_text_quoted(template, given, lost, encoder):
    with pytest.raises(ContentError, match=rf"{PLACE}: the chat template .*{lost}") as raised:
        encoder(template).encode(given)
    assert raised.value.reason == "text or fields that the chat template leaves out"
    (dropped,) = encoder(template).encode_many([given])
    assert str(dropped) == str(raised.value)


def test_text_that_is_moved_trimmed_or_escaped_is_held(encoder):
    result = {"role": "tool", "content": '{"sum": "4 é"}'}
    system = row("4", prompt=(SYSTEM, QUESTION, {"role": "assistant", "content": "?"}, QUESTION))
    assert isinstance(encoder("mistral", answers="verbatim").encode(system), Sample)
    with pytest.raises(BoundaryError, match=r"renders the prompt differently .* Set data.answers=verbatim"):
        encoder("mistral").encode(system)  # its system message goes missing once an answer follows
    for name, given in (
        ("trims", row(" x = 1\n", prompt=({**QUESTION, "content": " code \n"},))),
        ("escapes_tools", row("4", prompt=(QUESTION, {"role": "assistant", "content": "?"}, result))),
    ):
        assert isinstance(encoder(name).encode(given), Sample)


def test_fields_reach_the_template_and_those_it_leaves_out_of_an_answer_drop_the_row(encoder):
    reasoned = Response("4", fields={"reasoning_content": "two and two"})
    called = Response("", fields={"tool_calls": [call(a=2)]})
    both = row(reasoned, called, template_fields={"tools": TOOLS})
    prompt, responses = texts(encoder("qwen_3"), encoder("qwen_3").encode(both))
    assert '"name": "add_up", "parameters"' in prompt
    assert responses[0] == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    assert responses[1] == '<think>\n\n</think>\n\n<call>{"name": "add_up", "arguments": {"a": 2}}</call><|im_end|>'
    calls = (
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call(), call("f")]},
        {"role": "tool", "content": "4"},
    )
    for template, given, lost in (
        ("chatml", row(reasoned), "the chat template leaves out, from response 1, field 'reasoning_content'"),
        ("one_call", row(Response("", fields={"tool_calls": [call(), call("f")]})), "one of the tool_calls: .*'f'"),
        ("one_call", row(Response("I add.", fields={"tool_calls": [call()]})), "a part of response 1: 'I add.'"),
        ("chatml", row("4", template_fields={"tools": TOOLS}), "does not render the prompt's field 'tools'"),
        ("one_call", row("4", prompt=calls), "does not render all of the prompt's tool_calls"),
    ):
        with pytest.raises(ContentError, match=rf"{PLACE}: .*{lost}"):
            encoder(template).encode(given)
    with pytest.raises(ContentError, match="'reasoning_content', which only the chat template can render"):
        encoder("qwen_3", answers="verbatim").encode(row(reasoned))
    with pytest.raises(ContentError, match="field 'tools' needs a chat template"):
        encoder("qwen_3", chat_template="never").encode(row("4", prompt="2+2?", template_fields={"tools": TOOLS}))


def test_a_field_of_the_prompt_that_says_little_is_remarked_on(encoder):
    named = row("4", prompt=({**QUESTION, "name": "Ann"},))
    remark = "prompts have a field 'name' that the chat template does not render"
    assert encoder("chatml").encode(named).remarks == (remark,)
    assert encoder("chatml").encode(row("4")).remarks == ()


# ---------------------------------------------------------------------------------------- what templates put around it


@pytest.mark.parametrize("answers", ["template", "verbatim"])
def test_what_is_known_about_an_answer_is_remarked_on_where_it_is_not_rendered(answers, encoder):
    known = Response("4", fields={"id": "a-17", "model": "llama"})
    sample = encoder("chatml", answers=answers).encode(row(known))
    expected = [f"responses have a field '{name}' that is not rendered" for name in ("id", "model")]
    assert sorted(sample.remarks) == expected
    with pytest.raises(ContentError, match="'reasoning'"):
        encoder("chatml", answers=answers).encode(row(Response("4", fields={"id": "a", "reasoning": "two and two"})))


def test_the_header_of_a_template_without_a_generation_prompt_belongs_to_the_prompt(encoder):
    without = encoder("no_generation_prompt")
    assert texts(without, without.encode(row("4"))) == texts(encoder("chatml"), encoder("chatml").encode(row("4")))
    assert without.encode(row()).prompt.tolist() == without.encode(row("4")).prompt.tolist()
    (note,) = without.notes
    assert note.startswith("the chat template has no generation prompt: prompts end with '<|im_start|>assistant\\n'")
    # A blank before an answer is no header: it makes one token with the answer's first word.
    mistral = encoder("mistral")
    assert texts(mistral, mistral.encode(row("The answer")))[1] == [" The answer<|end|>"] and not mistral.notes


def test_what_the_template_adds_before_every_answer_is_noted(encoder):
    assert (
        "puts '<think>\\n\\n</think>\\n\\n' between the generation prompt and an answer" in encoder("qwen_3").notes[0]
    )
    assert not encoder("qwen_3", answers="verbatim").notes


def test_an_end_of_turn_that_is_no_token_is_refused_at_the_start(tokenizers):
    tokenizer = copy.deepcopy(tokenizers["own"])
    tokenizer.chat_template = TEMPLATES["chatml"]
    with pytest.raises(UserError, match=r"ends an answer with '<\|im_end\|>\\n', which contains no special token"):
        Encoder(tokenizer)
    assert end_tokens(tokenizer) == [tokenizer.eos_token_id]  # plain text can be trained on
    tokenizer.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert Encoder(tokenizer).notes == [
        "the chat template puts '<|im_end|>\\n' between an answer and its end token; it is learned"
    ]


def test_special_tokens_are_single_tokens_where_the_tokenizer_would_split_them(encoder):
    tokenizer = copy.deepcopy(encoder("chatml").tokenizer)
    tokenizer.split_special_tokens = True
    splitting = Encoder(tokenizer)
    assert "split_special_tokens is set" in splitting.notes[0]
    for one, other in zip(
        splitting.encode(row("4")).responses, encoder("chatml").encode(row("4")).responses, strict=True
    ):
        assert one.tolist() == other.tolist()


# ----------------------------------------------------------------------------------------------------------- verbatim


def test_verbatim_answers_follow_the_generation_prompt_unchanged_and_end_like_the_template_s(encoder):
    for name, end in (("r1", "<|end|>"), ("trims", "<|im_end|>"), ("qwen_3", "<|im_end|>"), ("no_end", "<|end|>")):
        verbatim = encoder(name, answers="verbatim")
        sample = verbatim.encode(row(REASONED, "  x = 1 \n"))
        assert sample.prompt.tolist() == encoder(name).encode(row()).prompt.tolist()
        # A template's own blanks around an answer stay.
        before, behind = (" ", "\n") if name == "no_end" else ("", "")
        expected = [f"{before}{answer}{behind}{end}" for answer in (REASONED, "  x = 1 \n")]
        assert texts(verbatim, sample)[1] == expected


def test_a_generation_prompt_that_opens_a_block_is_continued(encoder):
    verbatim = encoder("r1_opens_thinking", answers="verbatim")
    prompt, responses = texts(verbatim, verbatim.encode(row(REASONED, REASONED.removeprefix("<think>\n"))))
    assert prompt.endswith("<|assistant|><think>\n") and responses == ["two and two\n</think>\n\n4<|end|>"] * 2
    cut = row(Response("<think>\ntwo and", truncated=True))
    assert texts(verbatim, verbatim.encode(cut))[1] == ["two and"]
    for given, cause in (
        ("4", "response 1 has no </think>"),
        ("<think>4</think>", "begins with '<think>4', not wi"),
    ):
        with pytest.raises(BoundaryError, match=cause) as raised:
            verbatim.encode(row(given))
        assert raised.value.reason == "the generation prompt opens a block that the answer does not continue"
    for given, remedy in ((REASONED, ". Set data.answers=verbatim"), ("4", ", and the answer has no </think>")):
        with pytest.raises(BoundaryError, match=rf"ends with '<think>\\n', which .* before response 1{remedy}"):
            encoder("r1_opens_thinking").encode(row(given))


# --------------------------------------------------------------------------------------- text that is rendered already


def test_text_that_is_rendered_already_gets_no_second_beginning_or_end(encoder):
    never = encoder("chatml", chat_template="never")
    sample = never.encode(row("4<|end|>", "5", prompt="<|begin|>Q: 2+2?\nA:"))
    assert texts(never, sample) == ("<|begin|>Q: 2+2?\nA:", ["4<|end|>", "5<|end|>"])
    assert sample.remarks == ("prompts already begin with the tokenizer's beginning token, which is not added again",)
    auto = encoder("chatml")
    sample = auto.encode(row("4<|im_end|>\n", "<|im_start|>assistant\n5", prompt="<|im_start|>user\n2+2?<|im_end|>\n"))
    assert texts(auto, sample)[1] == ["4<|im_end|>", "<|im_start|>assistant\n5<|im_end|>"]
    assert sample.remarks == (
        "prompts contain the chat template's special tokens (<|im_start|>): if they are already rendered, set "
        "data.chat_template=never",
        "responses already end with the end token <|im_end|>, which is not repeated",
        "responses contain the chat template's special tokens (<|im_start|>)",
    )
    unended = encoder("no_end")
    assert texts(unended, unended.encode(row("4<|end|>")))[1] == [" 4<|end|>"]


def test_a_transcript_s_plain_text_is_used_where_there_is_no_template(encoder):
    text = "\n\nHuman: 2+2?\n\nAssistant:"
    given = Row((QUESTION,), (Response("4", plain_content=" 4"),), PLACE, plain_prompt=text)
    never = encoder("chatml", chat_template="never")
    assert texts(never, never.encode(given)) == (f"<|begin|>{text}", [" 4<|end|>"])
    assert "Human" not in texts(encoder("chatml"), encoder("chatml").encode(given))[0]


# ------------------------------------------------------------------------------------------------ weights, cut answers


def chat(*weights: int, contents=("four", "five", "six")) -> Row:
    turns = [{"role": "assistant", "content": c, "weight": w} for c, w in zip(contents, weights, strict=False)]
    later = [message for turn in turns[1:] for message in (QUESTION, turn)]
    first = Response(turns[0]["content"], weight=turns[0]["weight"], continuation=tuple(later))
    return Row((QUESTION,), (first,), PLACE)


def marked(encoder: Encoder, sample: Sample) -> str:
    (response,), (learned,) = sample.responses, sample.answers
    return encoder.tokenizer.decode(response[learned])


def test_a_conversation_whose_last_answer_merges_with_what_stands_before_it_is_dropped(encoder):
    """And is not learned up to there: its last answer would be context, which nobody asked for."""
    question, merges = {"role": "user", "content": "and 3+3?"}, {"role": "assistant", "content": "\n\n6"}
    chat = Response("4", continuation=(question, merges))
    with pytest.raises(BoundaryError, match=rf"{PLACE}: answer 2 of the conversation has no boundary in tokens"):
        encoder("chatml").encode(row(chat))


def test_answers_of_weight_0_are_context(encoder):
    chatml = encoder("chatml")
    assert marked(chatml, chatml.encode(chat(1, 0, 1))) == "four<|im_end|>six<|im_end|>"
    late = chatml.encode(chat(0, 1, 0))
    assert marked(chatml, late) == "five<|im_end|>"
    assert "four<|im_end|>" in texts(chatml, late)[0] and texts(chatml, late)[1][0].endswith("six<|im_end|>")
    for nothing in (chat(0, 0), row(Response("4", weight=0))):
        with pytest.raises(BoundaryError, match="weight 0") as raised:
            chatml.encode(nothing)
        assert raised.value.reason == "no answer to learn (weight 0)"


def test_verbatim_trains_conversations_whose_last_answer_a_template_renders_otherwise(encoder):
    template = encoder("qwen_3")
    assert marked(template, template.encode(chat(1, 1))) == "<think>\n\n</think>\n\nfive<|im_end|>"
    with pytest.raises(BoundaryError, match=r"answer 1 of the conversation has no boundary .* data.answers=verbatim"):
        template.encode(chat(1, 0))
    verbatim = encoder("qwen_3", answers="verbatim")
    assert marked(verbatim, verbatim.encode(chat(1, 1))) == "four<|im_end|>five<|im_end|>"


def test_a_truncated_answer_gets_no_end_token(encoder):
    for name in ("chatml", "mistral", "no_end"):
        sample = encoder(name).encode(row(Response("4 is the", truncated=True), "4 is the"))
        cut, whole = sample.responses
        assert len(whole) > len(cut) and np.array_equal(whole[: len(cut)], cut)
        assert encoder(name).end_token_id not in cut and whole[-1] == encoder(name).end_token_id


def test_end_tokens_are_counted_within_an_answer(encoder):
    chatml = encoder("chatml")
    end = chatml.end_token_id
    assert end_tokens(chatml.tokenizer) == [end, chatml.tokenizer.eos_token_id]
    assert inner_ends(chatml.encode(chat(1, 1)), end) == 0
    assert inner_ends(chatml.encode(chat(1, 1, contents=("o<|im_end|>ne", "two"))), end) == 1
    assert inner_ends(chatml.encode(row("4<|im_end|>\n", "a<|im_end|>b", "<|im_end|>c")), end) == 2


# --------------------------------------------------------------------------------------------------------------- fuzz

PIECES = [
    "four",
    "x",
    " ",
    "\n",
    "<think>\n",
    "</think>",
    "<|im_end|>",
    "<|im_start|>",
    "<|end|>",
    '"',
    "é漢",
    "[INST]",
]
CONTENTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
CALLS = st.lists(st.builds(call, st.sampled_from(["f", "add_up"]), x=CONTENTS), max_size=2)
FIELDS = st.fixed_dictionaries(
    {},
    optional={"reasoning_content": CONTENTS, "tool_calls": CALLS, "name": CONTENTS, "odd": st.none() | st.integers()},
)
MESSAGES = st.builds(
    lambda role, content, fields: {**fields, "role": role, "content": content},
    st.sampled_from(["user", "user", "system", "assistant", "tool"]),
    CONTENTS,
    st.just({}) | FIELDS,
)
RESPONSES = st.builds(
    Response, CONTENTS, fields=st.just({}) | FIELDS, weight=st.sampled_from([1, 1, 0]), truncated=st.booleans()
)
CHATS = st.builds(
    lambda response, later: (Response(response.content, continuation=tuple(later), weight=response.weight),),
    RESPONSES,
    st.lists(
        st.tuples(CONTENTS, CONTENTS, st.integers(0, 1)).map(
            lambda t: ({**QUESTION, "content": t[0]}, {"role": "assistant", "content": t[1], "weight": t[2]})
        ),
        min_size=1,
        max_size=2,
    ).map(lambda turns: [message for turn in turns for message in turn]),
)
ROWS = st.builds(
    Row,
    CONTENTS | st.lists(MESSAGES, min_size=1, max_size=3).map(tuple),
    st.lists(RESPONSES, min_size=1, max_size=2).map(tuple) | CHATS,
    st.just(PLACE),
    template_fields=st.sampled_from([{}, {}, {"tools": TOOLS}]),
)


@hypothesis.given(st.sampled_from(list(TEMPLATES)), st.sampled_from(["template", "verbatim"]), ROWS)
@hypothesis.settings(max_examples=400, deadline=None)
def test_whatever_is_in_a_row_each_response_holds_its_content_or_the_row_says_why_not(encoder, name, answers, given):
    encoder = encoder(name, answers=answers)
    (sample,) = encoder.encode_many([given])
    if isinstance(sample, UserError):
        assert PLACE in str(sample)
        return
    prompt, responses = texts(encoder, sample)
    end = encoder.tokenizer.decode([encoder.end_token_id])

    def bare(content: str) -> str:  # an end token that stands there already is the template's
        return content.strip().removesuffix(end).strip()

    if sample.answers is None:
        for response, text in zip(given.responses, responses, strict=True):
            opening = "<think>\n" if prompt.endswith("<think>\n") and response.content.startswith("<think>\n") else ""
            assert bare(response.content) in opening + text
            assert response.truncated or text.endswith(end)
    else:
        (response,), learned = given.responses, marked(encoder, sample)
        turns = [m for m in response.continuation if m["role"] == "assistant"]
        answers = [(response.content, response.weight), *((m["content"], m["weight"]) for m in turns)]
        context = any("are context and not learned" in remark for remark in sample.remarks)
        for number, (content, weight) in enumerate(answers, start=1):
            is_learned = weight and not (context and number < len(answers))
            assert bare(content) in (learned if is_learned else prompt + responses[0])


# ---------------------------------------------------------------------------------------------------- transformers 5


@needs_transformers_4
def test_a_tokenizer_that_transformers_5_saved_is_loaded(tokenizer_folder, tmp_path, caplog):
    folder = tmp_path / "of_5"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    expected = load_tokenizer(tokenizer_folder)
    for name in ("added_tokens_decoder", "additional_special_tokens"):
        config.pop(name)
    config["tokenizer_class"] = "TokenizersBackend"
    config["extra_special_tokens"] = [str(token) for token in expected.additional_special_tokens]
    config["model_specific_special_tokens"] = {"image_token": "<|user|>"}
    path.write_text(json.dumps(config))
    loaded = load_tokenizer(folder)
    assert Encoder(loaded).encode(row("4")).prompt.tolist() == Encoder(expected).encode(row("4")).prompt.tolist()
    assert set(loaded.all_special_tokens) == set(expected.all_special_tokens)
    assert not caplog.records and written_by_5(str(folder)) and not written_by_5(str(tokenizer_folder))
    save_for_4(str(folder), folder)
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert Encoder(again).encode(row("4")).prompt.tolist() == Encoder(expected).encode(row("4")).prompt.tolist()
    path.write_text(json.dumps({**config, "tokenizer_class": "SentencePieceBackend"}))
    with pytest.raises(UserError, match="names the class SentencePieceBackend, which transformers 5 saved"):
        load_tokenizer(folder)


def test_a_tokenizer_that_transformers_4_saved_is_loaded(tokenizer_folder, tmp_path):
    """Whichever release loads it: most published tokenizers are of this form."""
    folder = tmp_path / "of_4"
    folder.mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    expected = load_tokenizer(tokenizer_folder)
    added = {token.pop("id"): token for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    named = {"bos_token": expected.bos_token, "eos_token": expected.eos_token, "pad_token": expected.pad_token}
    others = [token["content"] for token in added.values() if token["content"] not in named.values()]
    config = {
        **named,
        "added_tokens_decoder": added,
        "additional_special_tokens": others,
        "chat_template": expected.chat_template,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_max_length": 1 << 20,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({**named, "additional_special_tokens": others}))
    loaded = load_tokenizer(folder)
    assert len(others) == 3 and added_tokens(loaded) == added_tokens(expected)
    asked = Encoder(loaded).encode(row("4")), Encoder(expected).encode(row("4"))
    assert [part.tolist() for part in (asked[0].prompt, *asked[0].responses)] == [
        part.tolist() for part in (asked[1].prompt, *asked[1].responses)
    ]
