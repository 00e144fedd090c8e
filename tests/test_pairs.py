import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grains_ext.pairs import PreferencePair, load_pairs, pair_from_row, save_pairs

USER = {"role": "user", "content": "What color is the sky?"}
SKY = PreferencePair("The sky is", "blue", "green")
ROW = {"prompt": "The sky is", "chosen": "blue", "rejected": "green"}


def says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": "blue", "rejected": "green"},
        {"question": "The sky is", "best_answer": "blue", "incorrect_answers": ["green", "red"]},
        {"Question": "The sky is", "Best Answer": "blue", "Incorrect Answers": ["green"]},
        {
            "question": "The sky is",
            "answer_matching_behavior": "blue",
            "answer_not_matching_behavior": "green",
        },
        {
            "question": "The sky is",
            "mc1_targets": {"choices": ["green", "blue", "red"], "labels": [0, 1, 0]},
        },
        {"prompt": "The sky is", "chosen": [says("blue")], "rejected": [says("green")]},
    ],
)
def test_known_layouts(row: dict) -> None:
    assert pair_from_row(row) == SKY


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, says("blue")], "rejected": [USER, says("green")]},
        {"prompt": [USER], "chosen": [says("blue")], "rejected": [says("green")]},
        {"prompt": [USER], "chosen": "blue", "rejected": "green"},
        # UltraFeedback: the prompt's text again beside the whole conversations.
        {
            "prompt": USER["content"],
            "chosen": [USER, says("blue")],
            "rejected": [USER, says("green")],
        },
    ],
)
def test_message_lists(row: dict) -> None:
    assert pair_from_row(row) == PreferencePair([USER], "blue", "green")


def test_system_field_becomes_a_message() -> None:
    row = {"system": "Be brief.", "question": "Sky?", "chosen": "blue", "rejected": "green"}
    assert pair_from_row(row).prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sky?"},
    ]


def test_id_and_images() -> None:
    pair = pair_from_row({**ROW, "id": 7, "image": "sky.png"})
    assert pair.id == "7"
    assert pair.images == ("sky.png",)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "chosen answer is empty"),
        ({"rejected": "  \n"}, "rejected answer is empty"),
        ({"rejected": " blue"}, "the same"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": None}, "no prompt"),
        ({"chosen": 3}, "must be a string, got 3"),
        ({"prompt": ["no", "messages"]}, "must be a string or a list of messages"),
        ({"prompt": float("nan")}, "must be a string or a list of messages.*, got nan"),
        ({"rejected": None}, "no dispreferred answer"),
        (
            {"chosen": [USER, says("blue")], "rejected": [says("hi"), says("green")]},
            "share every turn",
        ),
        ({"chosen": [says("a"), USER], "rejected": [says("a"), USER]}, "end with an assistant"),
        ({"chosen": None, "rejected": None, "mc1_targets": {"choices": ["a"]}}, "mc1_targets"),
        ({"chosen": "bl\ud83d"}, "half of a surrogate pair"),
        ({"id": "\udc00"}, "half of a surrogate pair"),
    ],
)
def test_bad_rows_say_why(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pair_from_row({**ROW, **change})


def test_jsonl_error_names_file_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n{not json\n" + json.dumps({**ROW, "chosen": ""}))
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 3: not valid JSON"):
        load_pairs(path)
    with pytest.warns(UserWarning, match=r"skipped 2 bad of 3 rows; .*line 3"):
        assert load_pairs(path, skip_bad=True) == [SKY]


def test_undecodable_line_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_pairs(path)


def test_json_list(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([ROW]))
    assert load_pairs(path) == [SKY]
    path.write_text("[1, ")
    with pytest.raises(ValueError, match=r"pairs\.json: not valid JSON"):
        load_pairs(path)


def test_a_json_file_may_hold_an_object_per_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n", encoding="utf-8-sig")
    assert load_pairs(path) == [SKY, SKY]
    path.write_text(f"{json.dumps(ROW)}\n{{\n")
    with pytest.raises(ValueError, match=r"pairs\.json, line 2: not valid JSON"):
        load_pairs(path)
    path.write_text(f"{json.dumps(ROW)}\n" + "[" * 100_000)
    with pytest.raises(ValueError, match=r"line 2: not valid JSON"):
        load_pairs(path)


def test_csv_that_cannot_be_read_says_where(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    header = "prompt,chosen,rejected\n"
    path.write_text(f"{header}The sky is,blue,green\n{'x' * 140_000},blue,green\n")
    with pytest.raises(ValueError, match=r"pairs\.csv, line 3: field larger"):
        load_pairs(path)
    path.write_bytes(f"{header}The café is,blue,green\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pairs\.csv is not UTF-8"):
        load_pairs(path)


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Question", "Best Answer", "Incorrect Answers"])
        writer.writerow(["two\nlines", "yes, it is", "no"])
        writer.writerow(["The sky is", "blue"])
    with pytest.raises(ValueError, match=r"pairs\.csv, line 4: no dispreferred"):
        load_pairs(path)
    with pytest.warns(UserWarning, match="skipped 1 bad of 2"):
        assert load_pairs(path, skip_bad=True) == [PreferencePair("two\nlines", "yes, it is", "no")]


def test_truthfulqa_csv_lists_several_wrong_answers_in_one_field(tmp_path: Path) -> None:
    path = tmp_path / "TruthfulQA.csv"
    path.write_text("Question,Best Answer,Incorrect Answers\nThe sky is,blue,green; red\n")
    assert load_pairs(path) == [SKY]
    # The file of 2025 says which wrong answer is the best.
    path.write_text(
        "Question,Best Answer,Best Incorrect Answer,Incorrect Answers\n"
        "The sky is,blue,green,red; green\n"
    )
    assert load_pairs(path) == [SKY]


def test_csv_row_with_too_many_fields(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nThe sky is,blue,green,unquoted\n")
    with pytest.raises(ValueError, match="line 2: more fields than the header"):
        load_pairs(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    table = pyarrow.Table.from_pylist(
        [
            {"question": "The sky is", "best_answer": "blue", "incorrect_answers": ["green"]},
            {"question": "The sky is", "best_answer": "", "incorrect_answers": ["green"]},
        ]
    )
    parquet.write_table(table, path)
    with pytest.raises(ValueError, match="row 1: the chosen answer is empty"):
        load_pairs(path)
    with pytest.warns(UserWarning, match="skipped 1 bad of 2"):
        assert load_pairs(path, skip_bad=True) == [SKY]


def test_iterables_of_rows_and_pairs() -> None:
    assert load_pairs(row for row in (ROW, SKY)) == [SKY, SKY]
    with pytest.raises(ValueError, match="row 1: expected an object"):
        load_pairs([ROW, "text"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="pass one split"):
        load_pairs({"train": [ROW]})


def test_no_pairs_no_file_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no preference pair"):
        load_pairs([])
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "pairs.txt").write_text("x")
    with pytest.raises(ValueError, match=r"\.txt file; expected \.jsonl"):
        load_pairs(tmp_path / "pairs.txt")


TEXT = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}),
    min_size=1,
    max_size=3,
)


@given(
    st.lists(
        st.tuples(st.one_of(TEXT, MESSAGES), TEXT, TEXT, st.none() | TEXT).filter(
            lambda fields: fields[1].strip() != fields[2].strip()
        ),
        min_size=1,
        max_size=4,
    )
)
def test_saved_pairs_load_back(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    pairs = [
        PreferencePair(prompt, good, bad, ("/a.png",), name) for prompt, good, bad, name in rows
    ]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    save_pairs(pairs, path)
    assert load_pairs(path) == pairs
