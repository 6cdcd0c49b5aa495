"""Boundaries between prompt and response, against what transformers itself makes of the same messages."""

import numpy as np
import pytest

from nemo_rao.batch import Response, Row
from nemo_rao.data.encode import BoundaryError, Encoder, load_tokenizer, pad_token_id
from nemo_rao.errors import UserError

MULTI_TURN = (
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I am well, thank you!"},
    {"role": "user", "content": "What is the answer?\n\nPlease."},
)
ANSWERS = ("The answer is 42.", "No.\n\n  It is not!", "é 漢字 🦊")
END = {"own": "<|end|>", "chatml": "<|im_end|>", "llama_3": "<|eot_id|>", "phi_3": "<|im_end|>", "no_end": "<|end|>"}


def row(prompt, *contents, location="data.jsonl line 7") -> Row:
    return Row(prompt, tuple(Response(content, 0.5) for content in contents), location)


@pytest.mark.parametrize("name", list(END))
@pytest.mark.parametrize("prompt", [MULTI_TURN, MULTI_TURN[1:2], "Hello, how are you?"], ids=["turns", "one", "text"])
def test_tokens_are_those_of_apply_chat_template_up_to_the_end_of_turn(name, prompt, tokenizers):
    tokenizer = tokenizers[name]
    sample = Encoder(tokenizer).encode(row(prompt, *ANSWERS))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    assert sample.prompt.tolist() == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    end = tokenizer.convert_tokens_to_ids(END[name])
    for answer, response in zip(ANSWERS, sample.responses, strict=True):
        whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], return_dict=False)
        ours = sample.prompt.tolist() + response.tolist()
        assert response[-1] == end and (response[:-1] != end).all()
        if name == "no_end":
            assert ours == [*whole, end]  # the end token is appended
        else:
            assert whole[: len(ours)] == ours
            assert (
                "".join(tokenizer.convert_ids_to_tokens(whole[len(ours) :]))
                in {
                    "own": [""],
                    "chatml": ["Ċ"],
                    "llama_3": [""],
                    "phi_3": ["Ċ<|end|>"],
                }[name]
            )
        assert tokenizer.decode(response[:-1]).strip() == answer


@pytest.mark.parametrize("name", list(END))
def test_encoding_many_rows_equals_encoding_each(name, tokenizers):
    encoder = Encoder(tokenizers[name])
    rows = [row(MULTI_TURN, *ANSWERS), row("Hello", "Yes."), row(MULTI_TURN[:2], *ANSWERS[:2])]
    for one, many in zip([encoder.encode(r) for r in rows], encoder.encode_many(rows), strict=True):
        assert np.array_equal(one.prompt, many.prompt)
        assert all(np.array_equal(a, b) for a, b in zip(one.responses, many.responses, strict=True))
    assert encoder.encode_many([]) == []


def test_a_sample_keeps_rewards_ranking_and_place(tokenizers):
    given = Row("Hi?", (Response("a", 0.25), Response("b", None)), "f line 3", ranked=True)
    sample = Encoder(tokenizers["own"]).encode(given)
    assert np.array_equal(sample.rewards, [0.25, np.nan], equal_nan=True)
    assert (sample.ranked, sample.location) == (True, "f line 3")
    assert {array.dtype for array in (sample.prompt, *sample.responses)} == {np.dtype(np.int32)}


def test_a_response_that_merges_with_the_generation_prompt_is_refused_with_its_place(tokenizers):
    with pytest.raises(BoundaryError, match=r"data.jsonl line 7: response 2 has no boundary in tokens"):
        Encoder(tokenizers["chatml"]).encode(row("Hi?", "fine", "\n\n\nmerges"))
    good, bad = Encoder(tokenizers["chatml"]).encode_many([row("Hi?", "fine"), row("Hi?", "\n\n\nmerges")])
    assert isinstance(bad, BoundaryError) and not isinstance(good, BoundaryError)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = "{{ bos_token }}{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BoundaryError, match=r"line 7: response 1 .* use another chat template"):
        Encoder(tokenizer).encode(row("Hi?", "fine"))


def test_a_response_that_the_template_trims_away_is_refused(tokenizers):
    with pytest.raises(BoundaryError, match=r"line 7: response 1 has no token before the end token"):
        Encoder(tokenizers["llama_3"]).encode(row("Hi?", " \n "))


def test_an_end_token_written_inside_a_response_does_not_cut_it(tokenizers):
    sample = Encoder(tokenizers["chatml"]).encode(row("Hi?", "one<|im_end|>two"))
    assert tokenizers["chatml"].decode(sample.responses[0]) == "one<|im_end|>two<|im_end|>"


def test_never_takes_text_as_it_stands_after_the_beginning_token(tokenizers):
    tokenizer = tokenizers["chatml"]
    encoder = Encoder(tokenizer, chat_template="never")
    sample = encoder.encode(row("User: Hello?\nAssistant:", " Yes.", "\n\nNo."))
    assert sample.prompt.tolist() == tokenizer("User: Hello?\nAssistant:")["input_ids"]
    assert sample.prompt[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(response) for response in sample.responses] == [" Yes.<|end|>", "\n\nNo.<|end|>"]
    with pytest.raises(BoundaryError, match=r"line 7: response 1 .* End plain-text prompts with one line break"):
        encoder.encode(row("The qui", "ck brown"))


def test_the_choice_of_template_must_fit_tokenizer_and_data(tokenizers):
    assert not Encoder(tokenizers["plain"]).uses_template
    with pytest.raises(UserError, match="has no chat template, but chat_template is 'always'"):
        Encoder(tokenizers["plain"], chat_template="always")
    with pytest.raises(UserError, match="'sometimes'; allowed are auto, always, never"):
        Encoder(tokenizers["own"], chat_template="sometimes")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="answers is 'raw'; allowed are template, verbatim"):
        Encoder(tokenizers["own"], answers="raw")  # type: ignore[arg-type]
    for encoder in (Encoder(tokenizers["plain"]), Encoder(tokenizers["own"], chat_template="never")):
        with pytest.raises(UserError, match=r"line 7: the prompt is a list of messages, which needs a chat template"):
            encoder.encode(row(MULTI_TURN, "x"))


def test_messages_that_the_template_refuses_are_named(tokenizers):
    tool = ({"role": "tool", "content": "x"},)
    with pytest.raises(UserError, match=r"line 7: the chat template .* rejects messages of tool \(roles are system"):
        Encoder(tokenizers["own"]).encode(row(tool, "y"))


def test_a_date_in_the_template_does_not_change_from_day_to_day(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ bos_token + date_string }}" + tokenizer.chat_template.replace("{{ bos_token }}", "")
    )
    for arguments, date in ((None, "26 Jul 2024"), ({"date_string": "1 Jan 2000"}, "1 Jan 2000")):
        sample = Encoder(tokenizer, template_arguments=arguments).encode(row("Hi?", "x"))
        assert tokenizer.decode(sample.prompt).startswith(f"<|begin|>{date}<|user|>")


def test_a_tokenizer_that_cannot_be_loaded_or_has_no_end_is_named(tmp_path, tokenizer_folder, monkeypatch):
    with pytest.raises(UserError, match=r"tokenizer .*nosuch: no such directory"):
        load_tokenizer(tmp_path / "nosuch")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .*empty: cannot be loaded"):
        load_tokenizer(tmp_path / "empty")
    endless = load_tokenizer(tokenizer_folder)
    endless.chat_template = None
    endless._special_tokens_map["eos_token"] = None
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UserError, match=r"tokenizer .*endless: has no end token. Set its eos_token"):
        load_tokenizer(tmp_path / "endless")


def test_padding_falls_back_on_the_end_token(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    assert pad_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------- conversations


CHAT = (
    {"role": "assistant", "content": "I am well, thank you!"},
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "The answer is 42."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "é 漢字 🦊"},
)


def chat_row() -> Row:
    return Row(MULTI_TURN[:2], (Response(CHAT[0]["content"], continuation=CHAT[1:]),), "chat.jsonl line 3")


@pytest.mark.parametrize("name", ["own", "chatml", "llama_3", "phi_3"])
def test_of_a_conversation_every_answer_is_marked_with_its_end_token_and_nothing_else(name, tokenizers):
    tokenizer = tokenizers[name]
    encoder = Encoder(tokenizer)
    sample = encoder.encode(chat_row())
    whole = tokenizer.apply_chat_template([*MULTI_TURN[:2], *CHAT], return_dict=False)
    ours = sample.prompt.tolist() + sample.responses[0].tolist()
    assert whole[: len(ours)] == ours and sample.responses[0][-1] == encoder.end_token_id
    assert sample.prompt.tolist() == tokenizer.apply_chat_template(
        list(MULTI_TURN[:2]), add_generation_prompt=True, return_dict=False
    )
    (marked,) = sample.answers
    starts = np.flatnonzero(np.diff(np.concatenate([[False], marked]).astype(int)) == 1)
    answers = [sample.responses[0][start:] for start in starts]
    lengths = [int(np.argmin(np.append(marked[start:], False))) for start in starts]
    texts = [tokenizer.decode(answer[:length]) for answer, length in zip(answers, lengths, strict=True)]
    assert [text.replace(END[name], "").strip() for text in texts] == [turn["content"] for turn in CHAT[::2]]
    assert all(answer[length - 1] == encoder.end_token_id for answer, length in zip(answers, lengths, strict=True))


def test_without_an_end_of_turn_in_the_template_the_last_answer_alone_gets_the_end_token(tokenizers):
    sample = Encoder(tokenizers["no_end"]).encode(chat_row())
    end = tokenizers["no_end"].eos_token_id
    assert sample.responses[0].tolist().count(end) == 1 and sample.responses[0][-1] == end
    assert sample.answers[0][-1] and 0 < sample.answers[0].sum() < len(sample.answers[0])


def test_conversations_and_single_answers_are_encoded_side_by_side(tokenizers):
    rows = [row(MULTI_TURN, *ANSWERS), chat_row(), row("Hello?", "Yes.")]
    together = Encoder(tokenizers["chatml"]).encode_many(rows)
    for one, sample in zip(rows, together, strict=True):
        alone = Encoder(tokenizers["chatml"]).encode(one)
        assert np.array_equal(alone.prompt, sample.prompt)
        assert all(map(np.array_equal, alone.responses, sample.responses))
        assert (sample.answers is None) == (one is not rows[1])


def test_earlier_answers_that_a_template_renders_otherwise_are_context_and_counted(tokenizers):
    import copy

    tokenizer = copy.deepcopy(tokenizers["chatml"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +",
        "(message['content'] if loop.last or message['role'] != 'assistant' else '...' + message['content']) +",
    )
    encoder, row = Encoder(tokenizer), chat_row()
    sample = encoder.encode(row)
    last = [message["content"] for message in row.responses[0].continuation if message["role"] == "assistant"][-1]
    assert sample.answers is not None and sample.answers[0].all()
    assert encoder.tokenizer.decode(sample.responses[0]).startswith(last)
    assert "..." in encoder.tokenizer.decode(sample.prompt)
    assert [remark for remark in sample.remarks if "are context and not learned" in remark]


def test_a_conversation_needs_a_chat_template(tokenizers):
    with pytest.raises(UserError, match="needs a chat template"):
        Encoder(tokenizers["plain"]).encode(chat_row())
