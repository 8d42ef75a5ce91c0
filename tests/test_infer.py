"""`t5jax infer` with files: streamed, gone on with after a crash, refused where it must be."""

import json

import pytest

from command_line import fails, run
from t5jax.bulk.output import AnswersFile
from t5jax.decoding import Answer, GenerationOptions, options_of


class Model:
    """Answers with the prompt in capitals and its number."""

    class tokenizer:
        chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        special_tokens = {}  # noqa: RUF012

    def __init__(self):
        self.asked, self.dies_at = [], None

    def load(self, *_, **__):
        return self

    def check_writes(self):
        pass

    def chat_prompt(self, text):
        return [ord(c) for c in text]

    def options(self, **given):
        return options_of({}, given)

    def answers(self, prompts, how, *, first, **_):
        if self.dies_at is not None and first >= self.dies_at:
            raise KeyboardInterrupt
        prompts = [p if isinstance(p, str) else "".join(map(chr, p)) for p in prompts]
        self.asked += prompts
        return [
            [
                Answer(f"{text.upper()}\n{first + i}.{n}", [7, 1], "stop", -0.5, [-0.25, -0.25])
                for n in range(how.num_answers)
            ]
            for i, text in enumerate(prompts)
        ]


@pytest.fixture
def model(monkeypatch):
    model = Model()
    monkeypatch.setattr("t5jax.pretrained.load", model.load)
    return model


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_what_was_answered_is_not_asked_again(model, tmp_path, capsys):
    texts = [f"text {i}" for i in range(11)]
    prompts, out = write(tmp_path / "in.txt", texts), tmp_path / "out.txt"
    command = ["infer", "m", "--input", prompts, "--output", out, "--batch-size", "1"]
    command += ["--num-answers", "2", "--temperature", "1"]
    model.dies_at = 4
    assert run(capsys, *command)[0] == 130
    expected = [f"TEXT {i} {i}.{n}" for i in range(11) for n in range(2)]
    assert out.read_text().splitlines() == expected[:8]
    out.write_bytes(out.read_bytes() + b"TEXT 4 4.0\nTEXT 4 4")  # Killed within a line.
    model.dies_at = None
    status, _, err = run(capsys, *command)
    assert (status, err) == (0, f"wrote {out}: 11 prompts, 4 of them before\n")
    assert out.read_text().splitlines() == expected
    assert model.asked == texts
    # Once more there is nothing to do, unless prompts have been added.
    write(prompts, [*texts, "more"])
    assert run(capsys, *command)[0] == 0
    assert model.asked == [*texts, "more"]
    for change, message in (
        (["--seed", "3"], "seed was 0 and is 3"),
        (["--top-k", "3"], "top_k was null and is 3"),
    ):
        assert f"{out} was begun otherwise: {message}" in fails(capsys, *command, *change)
    write(prompts, ["other", *texts])
    assert "was begun otherwise: input was" in fails(capsys, *command)
    (tmp_path / "out.txt.run.json").unlink()
    assert "exists already, and there is no out.txt.run.json" in fails(capsys, *command)


def test_shards_are_together_what_one_command_writes(model, tmp_path, capsys):
    rows = [json.dumps({"prompt": f"text {i}"}) for i in range(7)]
    prompts = write(tmp_path / "in.jsonl", [*rows[:3], "", *rows[3:]])
    command = ["infer", "m", "--input", prompts, "--batch-size", "1", "--output"]
    assert run(capsys, *command, tmp_path / "whole.jsonl")[0] == 0
    model.asked.clear()
    parts = [tmp_path / f"out-0000{k}-of-00003.jsonl" for k in range(3)]
    for k in range(3):
        status, _, err = run(capsys, *command, tmp_path / "out.jsonl", "--shard", f"{k}/3")
        assert (status, err) == (0, f"wrote {parts[k]}: {[2, 2, 3][k]} prompts\n")
    assert model.asked == [f"text {i}" for i in range(7)]
    assert "".join(p.read_text() for p in parts) == (tmp_path / "whole.jsonl").read_text()
    # One goes on where it was; it is no other share.
    parts[2].write_text(parts[2].read_text()[:-5])
    again = [*command, tmp_path / "out.jsonl", "--shard"]
    assert run(capsys, *again, "2/3")[2] == f"wrote {parts[2]}: 3 prompts, 2 of them before\n"
    assert "".join(p.read_text() for p in parts) == (tmp_path / "whole.jsonl").read_text()
    write(prompts, [*rows, *rows])
    assert "was begun otherwise: " in (message := fails(capsys, *again, "2/3"))
    assert "shard was [4, 7] and is [9, 14]" in message
    for shard in ("3/3", "-1/3", "x", "1"):
        message = fails(capsys, *command, "out.jsonl", f"--shard={shard}")
        assert f"--shard is {shard}; expected NUMBER/SHARDS" in message
    assert "--shard divides a file" in fails(capsys, "infer", "m", "--prompt", "a", "--shard=0/2")


def test_json_lines_have_fields_templates_and_scores(model, tmp_path, capsys):
    rows = [{"id": 3, "prompt": "a", "who": "Ada"}, {"prompt": "b\u2028c", "who": "Bo"}]
    prompts = write(tmp_path / "in.jsonl", map(json.dumps, rows))
    out = tmp_path / "out.jsonl"
    assert run(capsys, "infer", "m", "--input", prompts, "--output", out, "--logprobs", "0")[0] == 0
    read = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [one["prompt"] for one in read] == rows
    assert read[0]["answers"] == [
        {
            "text": "A\n0.0",
            "finish": "stop",
            "tokens": [7, 1],
            "score": -0.5,
            "log_probs": [-0.25, -0.25],
        }
    ]
    assert model.asked == ["a", "b\u2028c"]
    run(capsys, "infer", "m", "--input", prompts, "--template", "Greet {{ who }}:")
    assert model.asked[2:] == ["Greet Ada:", "Greet Bo:"]
    message = fails(capsys, "infer", "m", "--input", prompts, "--field", "promt")
    assert "in.jsonl, line 1: there is no field 'promt'; did you mean prompt?" in message
    write(prompts, ['{"prompt": "a"}', "{"])
    assert "in.jsonl, line 2, is not JSON" in fails(capsys, "infer", "m", "--input", prompts)
    write(prompts, ['{"prompt": "a"}', r'{"prompt": "cut: \ud83d"}'])
    message = fails(capsys, "infer", "m", "--input", prompts)
    assert "in.jsonl, line 2: character 6 of the text is '\\ud83d', half of a surrogate" in message
    message = fails(capsys, "infer", "m", "--prompt", "caf\udce9")
    assert "--prompt, line 1: character 4 of the text is '\\udce9'" in message
    (tmp_path / "latin.txt").write_bytes(b"a\nb\xe9\n")
    assert "line 2, is not UTF-8" in fails(capsys, "infer", "m", "--input", tmp_path / "latin.txt")


def test_chat(model, tmp_path, capsys):
    run(capsys, "infer", "m", "--prompt", "Hi.", "--chat", "--system", "Be brief.")
    assert model.asked == ["<system>Be brief.<user>Hi.<assistant>"]
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    whole = [*turns, {"role": "user", "content": "Bye."}]
    prompts = write(tmp_path / "in.jsonl", [json.dumps({"messages": whole})])
    run(capsys, "infer", "m", "--input", prompts, "--chat")
    assert model.asked[1:] == ["<user>Hi.<assistant>Hello.<user>Bye.<assistant>"]
    write(prompts, [json.dumps({"messages": turns})])
    message = fails(capsys, "infer", "m", "--input", prompts, "--chat")
    assert "line 1: field 'messages' ends with a reply" in message
    model.tokenizer = type("Plain", (), {"chat_template": None})
    assert "m has no chat template" in fails(capsys, "infer", "m", "--prompt", "a", "--chat")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a", "--input", "x"], "--prompt and --input are both given"),
        (["--input", "absent.txt"], "cannot read absent.txt: No such file"),
        (["--prompt", "a", "--logprobs", "2"], "--logprobs are written to JSON lines"),
        (["--prompt", "a", "--template", "{{ b }}"], "--template makes prompts of JSON lines"),
        (["--prompt", "a", "--system", "b"], "--system is for --chat"),
        (["--prompt", "a", "--top-p", "0.5", "--temperature", "0"], "would change nothing"),
        (["--prompt", "a", "--seed", "5"], "--seed 5 would change nothing"),
        (["--prompt", "a", "--output", "absent/x.txt"], "there is no folder absent"),
        (["--prompt", "a", "--json-schema", "absent.json"], "--json-schema absent.json: No such"),
        (["--input", "in.json"], "--input in.json: expected a file of JSON lines, which ends in"),
        (["--prompt", "a", "--output", "o.json"], "--output o.json: expected a file of JSON"),
        (["--prompt", "a", "--field", "b"], "--field b is of JSON lines"),
        (["--prompt", "a", "--output", "o.txt", "--json-lines"], "--json-lines is of standard"),
    ],
)
def test_what_contradicts_or_is_missing_is_one_message(args, message, model, capsys):
    assert message in fails(capsys, "infer", "m", *args)


def test_a_full_disk_loses_nothing(model, tmp_path, capsys, monkeypatch):
    prompts, out = write(tmp_path / "in.txt", "abcdefgh"), tmp_path / "out.txt"
    command = ["infer", "m", "--input", prompts, "--output", out, "--batch-size", "1"]
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # The first is of what is asked.
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("t5jax.bulk.output.os.fsync", full)
        message = fails(capsys, *command)
    assert f"cannot write {out}: No space left on device; the answers to 4 prompts are" in message
    assert len(out.read_text().splitlines()) == 4
    assert run(capsys, *command)[0] == 0
    assert [line[0] for line in out.read_text().splitlines()] == list("ABCDEFGH")


def test_a_file_that_may_not_be_written_is_one_message(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write .*proc/answers: .*give another file"):
        AnswersFile(type(tmp_path)("/proc/answers"), {})


def test_a_folder_that_is_full_from_the_start_is_one_message(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t5jax.bulk.output.storage.write_file", full)
    with pytest.raises(ValueError, match="cannot write .*: No space left on device; make room"):
        AnswersFile(tmp_path / "answers", {})


def test_two_commands_do_not_write_one_file(tmp_path):
    path = tmp_path / "answers"
    with AnswersFile(path, {"model": "a"}) as first:
        with pytest.raises(ValueError, match="another command is writing"):
            AnswersFile(path, {"model": "b"})
        first.write(["1"], 1)
    with AnswersFile(path, {"model": "a"}) as again:
        assert again.num_prompts == 1


def test_the_options_of_the_command_are_those_of_generation():
    from t5jax.commands.infer import _GENERATION, Infer

    assert GenerationOptions().early_stopping == "false"
    missing = set(GenerationOptions.__dataclass_fields__) - set(_GENERATION)
    assert missing == {"max_length"}  # It is only read from generation_config.json.
    assert set(_GENERATION) <= set(Infer.__dataclass_fields__)
