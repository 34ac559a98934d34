import itertools
import json
import math
import random
import shutil
import subprocess
import threading
from importlib.metadata import version
from pathlib import Path

import openai
import pytest
import torch

from gpt import GPT, MODELS
from gpt.models.encoder_decoder import EncoderDecoder
from gpt.sampling import SamplingParams
from serving.http.introspection import NextTokenRequest, XrayRequest
from serving.http.limits import Limits
from serving.http.protocol import (
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from serving.tokenization import token_text, tokenize_prompt
from tests.serving.running_server import (
    CONTEXT_LENGTH,
    DEADLINE,
    JSON,
    TOKENIZER,
    RunningServer,
    read_stream,
    reference,
    request_and_disconnect,
)
from tests.tokenizer.kinds import KINDS
from tokenizer import END_OF_TEXT, Tokenizer

PROMPT = b'{"prompt": "a", '


@pytest.fixture(scope="module")
def server(model):
    server = RunningServer(model, 4)
    yield server
    server.close()


@pytest.fixture
def one_slot_server(model):
    """A server of one slot for one test, which may break it."""
    server = RunningServer(model, 1)
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_completion_equals_generate(model, client):
    response = client.completions.create(model="tiny", prompt="def ", max_tokens=30, temperature=0)
    assert response.choices[0].text == reference(model, "def ", SamplingParams(0.0), 30)
    assert response.choices[0].finish_reason == "length"
    assert (response.usage.prompt_tokens, response.usage.completion_tokens) == (5, 30)
    assert response.usage.total_tokens == 35
    assert client.completions.create(model="tiny", prompt="").usage.completion_tokens <= 16


def test_all_sampling_params_reach_the_sampler(model, client):
    sampling = SamplingParams(1.2, 50, 0.9, 0.001, 1.1, 0.3, 0.2, seed=-7)
    response = client.completions.create(
        model="tiny",
        prompt="ab",
        max_tokens=25,
        temperature=1.2,
        top_p=0.9,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=-7,
        n=3,
        user="someone",
        extra_body={"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.1},
    )
    texts = [reference(model, "ab", sampling, 25, choice) for choice in range(3)]
    assert [choice.text for choice in response.choices] == texts
    assert len(set(texts)) == 3


def test_openai_client_streaming(model, client):
    stream = client.completions.create(
        model="tiny",
        prompt="é",
        max_tokens=20,
        n=2,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, usage = ["", ""], None
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
        usage = chunk.usage or usage
    assert texts == [reference(model, "é", SamplingParams(seed=3), 20, choice) for choice in (0, 1)]
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 40)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["a", "", "bc"], ["a", "", "bc"]),
        ([256, 97], ["a"]),
        ([[256, 97], [256]], ["a", ""]),
    ],
)
def test_four_prompt_forms(model, client, prompt, texts):
    response = client.completions.create(model="tiny", prompt=prompt, max_tokens=5, n=2, seed=1)
    expected = [
        reference(model, text, SamplingParams(seed=1), 5, n) for text in texts for n in (0, 1)
    ]
    assert [choice.text for choice in response.choices] == expected
    assert [choice.index for choice in response.choices] == list(range(2 * len(texts)))


def test_outputs_without_seed_differ(client):
    response = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    again = client.completions.create(model="tiny", prompt=["a", "a"], n=2)
    assert len({choice.text for choice in (*response.choices, *again.choices)}) == 8


def test_openai_client_raises_its_error_types(client):
    with pytest.raises(openai.NotFoundError, match="no model named 'other'; available: tiny"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature must be between 0 and 100"):
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinygpt"


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_curl_streaming(model, server):
    body = json.dumps({"prompt": "x", "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", "-H", "Content-Type: application/json", "-d", body]
    done = subprocess.run(
        [*command, server.address + "/v1/completions"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=True,
    )
    texts, finish_reasons, usage = read_stream(done.stdout.splitlines())
    assert texts == {0: reference(model, "x", SamplingParams(0.0), 12)}
    assert finish_reasons == {0: "length"}
    assert usage is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected a JSON object"),
        (b"{", "the body is not JSON"),
        (b'{"prompt": "\xff"}', "body"),
        (b"[1]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'"a"', "expected a JSON object"),
        (b"[" * 100_000, "body"),
        (b'{"prompt": []}', "prompt: expected a string"),
        (b'{"prompt": [[]]}', "the prompt is empty"),
        (b'{"prompt": {}}', "prompt: expected a string"),
        (b'{"prompt": ["a", 1]}', "prompt: expected a string"),
        (b'{"prompt": [1, true]}', "prompt: expected a string"),
        (b'{"prompt": [1.5]}', "prompt: expected a string"),
        (b'{"prompt": [257]}', "token 257, the model knows 0 to 256"),
        (b'{"prompt": [-1]}', "token -1"),
        (b'{"prompt": [1' + b"0" * 400 + b"]}", "the model knows 0 to 256"),
        (b'{"prompt": [1' + b"0" * 5000 + b"]}", "body"),
        (b'{"prompt": "a\\ud800"}', "U+D800, half of a surrogate pair"),
        (b'{"\\ud800": 1, "prompt": "a"}', "unicode"),
        (PROMPT + b'"model": 1}', "model: Input should be a valid string"),
        (
            b'{"prompt": "' + b"a" * CONTEXT_LENGTH + b'"}',
            "20001 tokens long, the model's context holds",
        ),
        (PROMPT + b'"temperature": NaN}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": Infinity}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": 1e999}', "temperature: Input should be a finite number"),
        (PROMPT + b'"temperature": 1' + b"0" * 400 + b"}", "temperature"),
        (PROMPT + b'"temperature": "1"}', "temperature"),
        (PROMPT + b'"temperature": true}', "temperature"),
        (PROMPT + b'"temperature": 101}', "temperature must be between 0 and 100, not 101"),
        (PROMPT + b'"top_p": 1.1}', "top_p must be between 0 and 1"),
        (PROMPT + b'"top_k": -2}', "top_k must be between"),
        (PROMPT + b'"top_k": 1.5}', "top_k"),
        (PROMPT + b'"min_p": 2}', "min_p must be between 0 and 1"),
        (PROMPT + b'"repetition_penalty": 0}', "repetition_penalty must be between"),
        (PROMPT + b'"presence_penalty": 3}', "presence_penalty must be between -2 and 2"),
        (PROMPT + b'"frequency_penalty": -3}', "frequency_penalty must be between -2 and 2"),
        (PROMPT + b'"seed": 9223372036854775808}', "seed must be between"),
        (PROMPT + b'"seed": 1' + b"0" * 400 + b"}", "seed"),
        (PROMPT + b'"max_tokens": -1}', "max_tokens"),
        (PROMPT + b'"max_tokens": 65537}', "max_tokens = 65537: this server allows 65536"),
        (PROMPT + b'"max_tokens": 1' + b"0" * 99 + b"}", "max_tokens"),
        (PROMPT + b'"n": 0}', "n: "),
        (PROMPT + b'"n": 129}', "prompts times n = 129: this server allows 128"),
        (b'{"prompt": ["a", "b"], "n": 65}', "prompts times n = 130: this server allows 128"),
        (PROMPT + b'"stop": ["1", "2", "3", "4", "5"]}', "stop strings = 5: this server allows 4"),
        (PROMPT + b'"stop": "' + b"a" * 257 + b'"}', "length of a stop string = 257"),
        (
            PROMPT + b'"stop": ""}',
            "stop: expected a string or a list of strings, none of them empty",
        ),
        (PROMPT + b'"stop": [1]}', "stop: expected a string"),
        (PROMPT + b'"stream": "yes"}', "stream"),
        (
            PROMPT + b'"stream_options": {"include_usage": true}}',
            "stream_options needs stream: true",
        ),
        (PROMPT + b'"stream": true, "stream_options": {"x": 1}}', "'stream_options.x'"),
        (PROMPT + b'"logprobs": 6}', "logprobs = 6: this server allows 5"),
        (PROMPT + b'"logprobs": true}', "logprobs"),
        (PROMPT + b'"echo": 1}', "echo"),
        (PROMPT + b'"best_of": 2}', "best_of must equal n = 1 or be omitted, not 2"),
        (PROMPT + b'"suffix": "x"}', "suffix is not supported"),
        (PROMPT + b'"logit_bias": [5]}', "logit_bias: expected an object"),
        (PROMPT + b'"logit_bias": {"5": 101}}', "logit_bias must map token ids"),
        (PROMPT + b'"logit_bias": {"5": NaN}}', "logit_bias"),
        (PROMPT + b'"logit_bias": {"a": 1}}', "logit_bias: expected token ids"),
        (PROMPT + b'"logit_bias": {"257": 1}}', "logit_bias has token 257, the model knows 0 to"),
        (PROMPT + b'"logit_bias": {"' + b"9" * 5000 + b'": 1}}', "logit_bias"),
        (PROMPT + b'"num_beams": 2}', "num_beams is for translation models"),
        (PROMPT + b'"num_beams": 17}', "num_beams = 17: this server allows 16"),
        (PROMPT + b'"temprature": 1}', "unknown field 'temprature'"),
        (PROMPT + b'"' + b"x" * 100_000 + b'": 1}', "unknown field"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_invalid_request_is_400_with_reason(server, body, message, stream):
    if stream and body.startswith(PROMPT) and b"stream" not in body:
        body = body.replace(PROMPT, PROMPT + b'"stream": true, ')
    response = server.http.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert len(response.content) < 1000, "the error does not contain the body"
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/nothing", 404),
        ("GET", "/page/nothing.js", 404),
        ("POST", "/", 405),
        ("POST", "/v1/chat/completions", 404),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/%ff%00", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ],
)
def test_unknown_routes_return_openai_errors(server, method, path, status):
    response = server.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [999]}, "prompt"),
        ({"prompt": "a" * CONTEXT_LENGTH}, "prompt"),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"n": 129}, "n"),
        ({"model": "other"}, "model"),
        ({"max_tokens": 65537}, "max_tokens"),
        ({"max_tokens": CONTEXT_LENGTH + 1, "truncate_prompt_tokens": -1}, "max_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": 1, "stop_token_ids": [*range(257)]}, "min_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": 6}, "logprobs"),
        ({"best_of": 2}, "best_of"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_beams": 2, "stop_token_ids": [1]}, "stop_token_ids"),
        ({"num_beams": 2, "ignore_eos": True}, "ignore_eos"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"suffix": "x"}, "suffix"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_error_names_the_field_at_fault(server, fields, param):
    response = server.complete(**{"prompt": "a", **fields})
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v1/completions", CompletionRequest),
        ("/v1/next", NextTokenRequest),
        ("/v1/xray", XrayRequest),
        ("/tokenize", TokenizeRequest),
        ("/detokenize", DetokenizeRequest),
    ],
)
def test_error_of_a_wrong_type_names_the_field(server, path, schema):
    for name in schema.model_fields:
        body = {"prompt": "a", "tokens": [], name: {"x": [1]}}
        body = {key: body[key] for key in body if key in schema.model_fields}
        response = server.http.post(path, json=body)
        assert response.status_code == 400, name
        assert response.json()["error"]["param"].split(".")[0] == name


def test_line_ends_in_a_text_end_no_event(server):
    text = "".join(chr(i) for i in range(0x3000) if len(f"a{chr(i)}b".splitlines()) > 1)
    assert {*"\r\n\v\f\x1c\x1d\x1e\x85\u2028\u2029"} == {*text}
    body = {"prompt": text, "echo": True, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    whole = server.complete(**body)
    assert len(whole.text.splitlines()) == 1
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        texts, _, _ = read_stream(list(response.iter_lines()))
    assert texts[0].startswith(text)
    assert texts[0] == whole.json()["choices"][0]["text"]
    error = server.complete(prompt="a", model=text)
    assert len(error.text.splitlines()) == 1
    assert repr(text)[1:-1][:9] in error.json()["error"]["message"]


def force(token):
    """Request fields with which every token is this one."""
    return {"logit_bias": {str(token): 100}, "temperature": 0}


def test_ignore_eos_and_skip_special_tokens(server):
    body = {"prompt": "a", "max_tokens": 4, **force(256), "logprobs": 0, "return_token_ids": True}
    (choice,) = server.complete(**body).json()["choices"]
    assert (choice["text"], choice["token_ids"], choice["finish_reason"]) == ("", [], "stop")
    body["ignore_eos"] = True
    for skip, text in ((True, ""), (False, 4 * END_OF_TEXT)):
        response = server.complete(**body, skip_special_tokens=skip).json()
        (choice,) = response["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert choice["token_ids"] == [256] * 4
        assert choice["logprobs"]["tokens"] == [END_OF_TEXT] * 4
        assert choice["logprobs"]["text_offset"] == [i * len(text) // 4 for i in range(4)]
        assert response["usage"]["completion_tokens"] == 4
    server.async_engine.stream_interval = 0
    longer = {**body, "max_tokens": 60}
    chunks = server.complete(**longer, stream=True).text.split("\n\n")[:-2]
    ids = [json.loads(chunk[6:])["choices"][0]["token_ids"] for chunk in chunks]
    assert len(ids) > 1  # although there is no text
    assert [*itertools.chain(*ids)] == [256] * 60
    # A stop string may be spelled by it, and stop token ids apply.
    stopped = server.complete(**body, skip_special_tokens=False, stop="|><|").json()
    assert stopped["choices"][0]["text"] == "<|endoftext"
    stopped = server.complete(**body, stop_token_ids=[256]).json()["choices"][0]
    assert (stopped["token_ids"], stopped["finish_reason"]) == ([], "stop")


def test_skip_special_tokens_is_for_the_echo_of_token_ids_too(server):
    body = {"prompt": [97, 195, 256, 98], "max_tokens": 0, "echo": True, "logprobs": 0}
    for skip, text, offsets in (
        (True, "a\ufffdb", [0, 1, 1, 2]),
        (False, f"a\ufffd{END_OF_TEXT}b", [0, 1, 2, 15]),
    ):
        choice = server.complete(**body, skip_special_tokens=skip).json()["choices"][0]
        assert choice["text"] == text
        assert choice["logprobs"]["text_offset"] == offsets


def test_min_tokens_delays_eos_stop_token_ids_and_stop_strings(server, model):
    eos = server.complete(prompt="a", min_tokens=3, **force(256), logprobs=0).json()["choices"][0]
    assert len(eos["logprobs"]["tokens"]) == 4
    assert eos["logprobs"]["tokens"][-1] == END_OF_TEXT
    assert eos["finish_reason"] == "stop"
    for stop, expected in (("b", "bbbbb"), (["b", "bbb"], "bbb")):
        body = {"prompt": "a", "min_tokens": 5, "stop": stop, **force(98)}
        assert server.complete(**body).json()["choices"][0]["text"] == expected
    body = {"prompt": "a", "min_tokens": 5, "temperature": 0}
    text = reference(model, "a", SamplingParams(0.0), 16)
    for ids in ([ord(text[0])], [*text.encode()]):
        response = server.complete(**body, n=2, stop_token_ids=ids, return_token_ids=True).json()
        for choice in response["choices"]:
            assert len(choice["token_ids"]) >= 5
            assert not {*choice["token_ids"][:5]} & {*ids}


def test_stop_token_ids_end_the_output(server, model):
    text = reference(model, "a", SamplingParams(0.0), 40)
    raw = text.encode()
    stop = next(byte for i, byte in enumerate(raw) if i > 4 and byte < 128 and byte not in raw[:i])
    cut = text[: text.index(chr(stop))]
    body = {"prompt": "a", "max_tokens": 40, "temperature": 0, "stop_token_ids": [stop, 256]}
    for options in ({}, {"echo": True}, {"n": 2}, {"stream": True}):
        response = server.complete(**body, **options, logprobs=1)
        if options.get("stream"):
            texts, reasons, _ = read_stream(response.text.split("\n"))
            assert (texts, reasons) == ({0: cut}, {0: "stop"})
            continue
        for choice in response.json()["choices"]:
            assert choice["text"].removeprefix("a" if options.get("echo") else "") == cut
            assert choice["finish_reason"] == "stop"
            # Like EOS, it is the last of the logprobs only.
            assert choice["logprobs"]["tokens"][-1] == chr(stop)
            assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])


def test_truncate_prompt_tokens_keeps_the_last(server):
    body = {"temperature": 0, "max_tokens": 8, "echo": True, "logprobs": 1}
    prompt = "one two é three"
    ids = TOKENIZER.encode(prompt)
    for size in (1, 6, 7, 100):
        truncated = server.complete(prompt=prompt, truncate_prompt_tokens=size, **body).json()
        if size < len(ids):
            expected = server.complete(prompt=ids[-size:], **body).json()
        else:
            expected = server.complete(prompt=prompt, **body).json()
        assert truncated["choices"] == expected["choices"]
        assert truncated["usage"] == expected["usage"]
    both = server.complete(prompt=[prompt, prompt], truncate_prompt_tokens=3, **body).json()
    first, second = ({**choice, "index": 0} for choice in both["choices"])
    assert first == second


def test_truncation_to_what_the_context_holds_leaves_room_for_max_tokens(model):
    server = RunningServer(model, 1, max_model_len=50)
    try:
        body = {"prompt": "x" * 200, "temperature": 0, "truncate_prompt_tokens": -1}
        for max_tokens in (0, 1, 20, 50):
            response = server.complete(**body, max_tokens=max_tokens).json()
            assert response["usage"] == {
                "prompt_tokens": 51 - max(max_tokens, 1),
                "completion_tokens": max_tokens,
                "total_tokens": 51 - max(max_tokens, 1) + max_tokens,
            }
        assert server.complete(**body, max_tokens=51).status_code == 400
    finally:
        server.close()


def test_add_special_tokens_false_starts_without_eos(server):
    body = {"temperature": 0, "return_token_ids": True, "echo": True, "logprobs": 1}
    text = server.complete(prompt="ab", add_special_tokens=False, **body).json()
    ids = server.complete(prompt=[97, 98], **body).json()
    assert (text["choices"], text["usage"]) == (ids["choices"], ids["usage"])
    assert text["choices"][0]["prompt_token_ids"] == [97, 98]


def test_empty_prompt_and_top_k_minus_one_mean_the_default(server):
    body = {"temperature": 1, "seed": 3, "max_tokens": 9}
    texts = {
        server.complete(**body, **fields).json()["choices"][0]["text"]
        for fields in ({"prompt": ""}, {"prompt": None}, {}, {"top_k": -1}, {"top_k": 0})
    }
    assert len(texts) == 1
    assert server.http.post("/v1/next", json={"prompt": "a", "top_k": -1}).status_code == 200


def test_fields_about_accounts_have_no_effect(server):
    body = {"prompt": "a", "seed": 3}
    fields = {
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "user": "x",
    }
    choices = [server.complete(**body, **more).json()["choices"] for more in ({}, fields)]
    assert choices[0] == choices[1]


@pytest.mark.parametrize("include_obfuscation", [False, True])
def test_continuous_usage_and_obfuscation(server, include_obfuscation):
    server.async_engine.stream_interval = 0
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": ["a", "bcd"], "n": 2, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    response = server.complete(
        **body,
        stream=True,
        stream_options={**options, "include_obfuscation": include_obfuscation},
    )
    lines = [line for line in response.text.split("\n") if line][:-1]
    *chunks, last = (json.loads(line.removeprefix("data: ")) for line in lines)
    counts = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        usage, index = chunk["usage"], choice["index"]
        assert usage["prompt_tokens"] == (2, 2, 4, 4)[index]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["completion_tokens"] >= counts.get(index, 0)
        counts[index] = usage["completion_tokens"]
    assert counts == dict.fromkeys(range(4), 5)
    assert last["usage"] == {"prompt_tokens": 6, "completion_tokens": 20, "total_tokens": 26}
    assert all(("obfuscation" in chunk) == include_obfuscation for chunk in (*chunks, last))
    if include_obfuscation:
        assert {len(line.encode()) % 64 for line in lines} == {0}
        assert len({chunk["obfuscation"] for chunk in chunks if chunk["obfuscation"]}) > 3


def test_chat_completions_says_what_to_use_instead(server):
    for options in ({"json": {"messages": []}}, {"content": b"{"}, {}):
        response = server.http.post("/v1/chat/completions", **options)
        assert response.status_code == 404
        message = response.json()["error"]["message"]
        assert "/v1/completions" in message
        assert "chat template" in message


def test_version(server):
    assert server.http.get("/version").json() == {"version": version("tinygpt")}


def test_model_name_with_lone_surrogate_is_unknown(server):
    response = server.http.post(
        "/v1/completions", content=b'{"prompt": "a", "model": "\\ud800"}', headers=JSON
    )
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_body_without_json_content_type_is_refused_with_expected_header(server):
    response = server.http.post("/v1/completions", data={"prompt": "a"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_null_means_default_and_neutral_values_are_accepted(server):
    nulls = dict.fromkeys(["temperature", "n", "stop", "stream", "logprobs", "suffix", "best_of"])
    assert server.complete(prompt="a", echo=False, logit_bias={}, **nulls).status_code == 200
    assert server.complete(prompt="a", temperature=1, top_p=1, min_p=0).status_code == 200
    assert server.complete(prompt="a", suffix="", best_of=1, user="x").status_code == 200
    assert server.complete(prompt="a", max_tokens=1, n=Limits.max_sequences).status_code == 200


def test_streamed_text_equals_unstreamed_text(server):
    rng = random.Random(0)
    for seed in range(40):
        body = {
            "prompt": "".join(rng.choices("ab é👩\n", k=rng.randrange(6))),
            "temperature": rng.choice([0, 0.5, 1, 3]),
            "seed": seed,
            "n": rng.choice([1, 3]),
            "max_tokens": rng.randint(1, 40),
            "stop": rng.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
            "ignore_eos": rng.choice([False, True]),
            "skip_special_tokens": rng.choice([False, True]),
            "stop_token_ids": rng.choice([[], [*range(65, 75)]]),
        }
        body["min_tokens"] = rng.randint(0, body["max_tokens"])
        whole = server.complete(**body).json()
        with server.http.stream(
            "POST",
            "/v1/completions",
            json={**body, "stream": True, "stream_options": {"include_usage": True}},
        ) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            texts, finish_reasons, usage = read_stream("".join(response.iter_text()).split("\n"))
        for choice in whole["choices"]:
            assert texts.get(choice["index"], "") == choice["text"]
            assert finish_reasons[choice["index"]] == choice["finish_reason"]
            stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"] or []
            assert body["min_tokens"] or not any(stop in choice["text"] for stop in stops)
        assert usage == whole["usage"]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_token_ids_decode_to_the_text_streamed_and_unstreamed(server, logprobs):
    rng = random.Random(1)
    for seed in range(30):
        prompt = "".join(rng.choices("ab é👩\n", k=rng.randrange(1, 6))).rstrip()
        body = {
            "prompt": rng.choice([prompt, TOKENIZER.encode(prompt) or [97]]),
            "temperature": rng.choice([0, 1, 3]),
            "seed": seed,
            "n": rng.choice([1, 3]),
            "max_tokens": rng.randint(0, 40),
            "stop": rng.choice([None, "I", ["9", "\ufffd\ufffd", "ab"]]),
            "echo": rng.choice([False, True]),
            "logprobs": logprobs,
            "return_token_ids": True,
        }
        prompt_ids = body["prompt"]
        if isinstance(prompt_ids, str):
            prompt_ids = tokenize_prompt(TOKENIZER, prompt_ids).ids
        whole = server.complete(**body).json()["choices"]
        streamed = {choice["index"]: [] for choice in whole}
        for line in server.complete(**body, stream=True).text.split("\n"):
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    first = not streamed[choice["index"]]
                    assert ("prompt_token_ids" in choice) == first
                    streamed[choice["index"]].append(choice)
        for choice in whole:
            assert choice["prompt_token_ids"] == prompt_ids
            chunks = streamed[choice["index"]]
            assert chunks[0]["prompt_token_ids"] == prompt_ids
            ids = choice["token_ids"]
            assert [token for chunk in chunks for token in chunk["token_ids"]] == ids
            decoded = TOKENIZER.decode(ids)
            if choice["finish_reason"] == "stop" and TOKENIZER.eos_token not in ids:
                # The last token may contain the start of the stop string.
                assert decoded.startswith(choice["text"])
            else:
                assert decoded == choice["text"]
            if logprobs is not None:
                tokens = choice["logprobs"]["tokens"]
                assert [token_text(TOKENIZER, token) for token in ids] == tokens[: len(ids)]
                assert tokens[len(ids) :] in ([], [END_OF_TEXT])


@pytest.fixture(params=KINDS)
def server_of_kind(request, tmp_path):
    """A server of an untrained model with a tokenizer of a kind."""
    KINDS[request.param]().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    torch.manual_seed(0)
    model = GPT(tokenizer.vocab_size, 64, width=16, depth=1, heads=1).eval()
    server = RunningServer(model, 4, tokenizer=tokenizer)
    yield server, tokenizer
    server.close()


def test_every_kind_of_tokenizer_is_served(server_of_kind):
    """Tokens and text offsets join to the text, prompts to outputs, and chunks to responses."""
    server, tokenizer = server_of_kind
    eos = tokenizer.token_name(tokenizer.eos_token)
    assert server.http.get("/tokenizer_info").json()["eos_token"] == eos
    detokenize = {"tokens": [tokenizer.eos_token, *tokenizer.encode("the cat")]}
    assert server.http.post("/detokenize", json=detokenize).json() == {"prompt": "the cat"}
    body = {"max_tokens": 40, "ignore_eos": True, "logprobs": 3, "return_token_ids": True, "n": 3}
    special = set(tokenizer.special_tokens.values())
    for prompt in ("", "Hello world,", "the cat ", "日本 naïve"):
        for echo in (False, True):
            request = {**body, "prompt": prompt, "echo": echo, "seed": len(prompt)}
            whole = server.complete(**request).json()["choices"]
            stream = server.complete(**request, stream=True).text.split("\n")
            texts, _, _ = read_stream([line for line in stream if line])
            for choice in whole:
                assert texts[choice["index"]] == choice["text"]
                ids = choice["prompt_token_ids"] * (not echo) + choice["token_ids"]
                text = tokenizer.decode(ids)
                names, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
                if not echo and prompt.endswith(" "):  # which the first token may start with
                    continue
                start = "" if echo else tokenizer.decode(choice["prompt_token_ids"])
                assert start + choice["text"] == text
                for name, offset in zip(names, offsets, strict=True):
                    is_text = name not in special and not name.startswith("bytes:")
                    assert not is_text or choice["text"].startswith(name, offset)


def test_token_ids_are_returned_only_on_request(server):
    choice = server.complete(prompt="a").json()["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}


def test_models_endpoint_describes_the_model(server, model):
    (info,) = server.http.get("/v1/models").json()["data"]
    assert info == server.http.get("/v1/models/tiny").json()
    assert info["rung"] == "gpt"
    assert (info["chapter"], info["year"], info["paper"]) == (15, GPT.year, GPT.paper)
    assert info["idea"] == GPT.idea
    assert info["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert (info["vocab_size"], info["eos_token_id"], info["dtype"]) == (257, 256, "float32")
    assert (info["translates"], info["bits_per_byte"], info["run"]) == (False, None, None)


def test_output_does_not_depend_on_concurrent_requests(server):
    bodies = [{"prompt": str(i), "seed": i, "max_tokens": 40} for i in range(12)]
    alone = [server.complete(**body).json()["choices"] for body in bodies]
    together = [None] * len(bodies)

    def send(i):
        together[i] = server.complete(**bodies[i]).json()["choices"]

    threads = [threading.Thread(target=send, args=(i,)) for i in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert together == alone


def test_stop_string_frees_its_slot(one_slot_server, model):
    text = reference(model, "", SamplingParams(0.0), 40)
    stop = text[-2:]
    response = one_slot_server.complete(
        prompt="", temperature=0, max_tokens=CONTEXT_LENGTH, stop=stop
    ).json()
    assert response["choices"][0]["text"] == text[: text.index(stop)]
    assert response["choices"][0]["finish_reason"] == "stop"
    # The only slot is free.
    assert one_slot_server.complete(prompt="", max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_aborts_running_and_waiting_sequences(one_slot_server, monkeypatch, stream):
    """One slot and three sequences: one runs, two wait."""
    engine = one_slot_server.engine
    step, abort = engine.step, engine.abort
    busy, freed = threading.Event(), threading.Event()

    def watched_step():
        events = step()
        if engine.running and engine.prefill and engine.prefill.num_started == 1:
            busy.set()
        return events

    def watched_abort(request, choice):
        abort(request, choice)
        if engine.is_idle:
            freed.set()

    monkeypatch.setattr(engine, "step", watched_step)
    monkeypatch.setattr(engine, "abort", watched_abort)
    body = {"prompt": "", "temperature": 0, "max_tokens": CONTEXT_LENGTH, "n": 3, "stream": stream}

    def until(connection):
        assert busy.wait(DEADLINE)
        if stream:
            received = b""
            while b'"text":' not in received:
                received += connection.recv(1000)

    request_and_disconnect(one_slot_server, body, until)
    assert freed.wait(DEADLINE)
    assert one_slot_server.complete(prompt="", max_tokens=1).status_code == 200
    assert not one_slot_server.async_engine._streams


def test_model_error_fails_only_its_request(one_slot_server, model, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(features_BTD):
            raise RuntimeError("secret")

        patch.setattr(model, "logits", fail)
        response = one_slot_server.complete(prompt="a")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the model failed on this request"
        streamed = one_slot_server.complete(prompt="a", stream=True)
        events = [line for line in streamed.text.split("\n") if line]
        assert json.loads(events[0].removeprefix("data: "))["error"]["type"] == "server_error"
        assert events[1:] == ["data: [DONE]"]
    assert one_slot_server.complete(prompt="a").status_code == 200
    assert one_slot_server.http.get("/health").json() == {"status": "ok"}


def test_health_is_503_after_engine_failure(one_slot_server, monkeypatch):
    monkeypatch.setattr(one_slot_server.engine, "step", lambda: 1 / 0)
    response = one_slot_server.complete(prompt="a")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert one_slot_server.complete(prompt="a", stream=True).status_code == 503
    assert one_slot_server.http.get("/health").status_code == 503
    assert one_slot_server.http.get("/ready").status_code == 503


def test_shutdown_ends_unstreamed_request_with_503(model, monkeypatch):
    server = RunningServer(model, 1)
    step, busy, responses = server.engine.step, threading.Event(), []

    def watched_step():
        events = step()
        busy.set()
        return events

    monkeypatch.setattr(server.engine, "step", watched_step)

    def send():
        responses.append(server.complete(prompt="", temperature=0, max_tokens=CONTEXT_LENGTH))

    sending = threading.Thread(target=send)
    sending.start()
    assert busy.wait(DEADLINE)
    server.server.should_exit = True
    sending.join(DEADLINE)
    server.close()
    assert responses[0].status_code == 503
    assert "shutting down" in responses[0].json()["error"]["message"]


def test_openapi_describes_every_field_and_docs_is_on_the_page(server):
    fields = server.http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]
    assert {"prompt", "top_k", "stream_options"} <= set(fields["properties"])
    assert all("description" in field for field in fields["properties"].values())
    docs = server.http.get("/docs")  # a view of the page, which loads nothing from other hosts
    assert (docs.status_code, docs.headers["location"]) == (307, "./#docs")
    assert server.http.get("/docs", follow_redirects=True).text.startswith("<!doctype html>")
    assert math.isclose(fields["properties"]["temperature"]["default"], 1.0)


def test_docs_list_every_field():
    table = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    names = {*CompletionRequest.model_fields} - {"stream_options", "suffix"}
    names |= {f"stream_options.{name}" for name in StreamOptions.model_fields}
    assert not {name for name in names if f"`{name}`" not in table}


@pytest.mark.parametrize("name", MODELS)
def test_streamed_text_equals_stateless_greedy_decoding(name):
    torch.manual_seed(0)
    model = MODELS[name](TOKENIZER.vocab_size, 64).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[-1] ** -0.5)
    server = RunningServer(model)
    try:
        body = {"prompt": "def f(", "max_tokens": 20, "temperature": 0, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            texts, finish_reasons, _ = read_stream(list(stream.iter_lines()))
    finally:
        server.close()
    # Each token from all tokens before it, without a state.
    prompt = tokenize_prompt(TOKENIZER, body["prompt"]).ids
    ids: list[int] = []
    with torch.inference_mode():
        while len(ids) < 20:
            if isinstance(model, EncoderDecoder):
                source_length_B = torch.tensor([len(prompt)])
                target_BT = torch.tensor([[prompt[-1], *ids]])
                state = model.encode(torch.tensor([prompt]), source_length_B)
                features_BTD = model.decode(target_BT, state)
            else:
                features_BTD = model.features(torch.tensor([[*prompt, *ids]]))
            token = int(model.logits(features_BTD[:, -1]).argmax())
            if token == TOKENIZER.eos_token:
                break
            ids.append(token)
    assert texts[0] == TOKENIZER.decode(ids)
    assert finish_reasons == {0: "length" if len(ids) == 20 else "stop"}
