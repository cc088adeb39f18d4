"""Claims about the byte-pair tokenizer."""

import pickle

import pytest

from disk.bytepair import FIRST, BytePairTokenizer, learn_merges, load_vocabulary, save_vocabulary

TEXTS = ["waving hand with light skin tone", "waving hand with dark skin tone", "flag : Åland", "a cat 🐈 on 2 mats ."]


@pytest.mark.parametrize("text", [*TEXTS, "日本 の 旗", "never seen before", "1234", "it's (fine)", "naïve"])
def test_every_text_comes_back(text):
    words = BytePairTokenizer(learn_merges(TEXTS, 400))
    assert words.decode(words.encode(text)) == text


def test_the_most_frequent_neighbours_are_merged_first():
    merges = learn_merges(["aab aab aab", "ac"], FIRST + 3)
    a, b, space = (4 + ord(c) for c in "ab ")
    assert merges[0] in ((space, a), (a, b), (a, a)) and len(merges) == 3
    assert learn_merges(["xyxyxy"] * 5, FIRST + 2)[0] == (4 + ord("x"), 4 + ord("y"))


def test_frequent_words_are_one_token_and_a_larger_vocabulary_makes_texts_shorter():
    small, large = (BytePairTokenizer(learn_merges(TEXTS, size)) for size in (FIRST + 5, FIRST + 120))
    assert len(large.encode("waving hand")) == 2 < len(small.encode("waving hand"))
    assert large.pieces(large.encode("waving hand")) == ["waving", "hand"]


def test_the_same_texts_give_the_same_merges_in_any_order():
    assert learn_merges(TEXTS, 350) == learn_merges(TEXTS[::-1], 350)


def test_signs_are_never_made_of_text_and_long_texts_are_cut():
    words = BytePairTokenizer(learn_merges(TEXTS, 300), longest=10)
    ids = words.encode("<eos> <image> " * 50)
    assert len(ids) == 10 and min(ids) >= 4 and max(ids) < len(words)
    assert len(words.encode("x" * 10**6)) == 10


def test_it_is_read_back_and_travels_to_other_processes(tmp_path):
    merges = learn_merges(TEXTS, 320)
    save_vocabulary(tmp_path / "v.json", merges)
    again = pickle.loads(pickle.dumps(load_vocabulary(tmp_path / "v.json", 64)))
    assert again.encode(TEXTS[0]) == BytePairTokenizer(merges).encode(TEXTS[0])


@pytest.mark.parametrize("content",
                         ["", "{}", "[]", '{"merges": [[1, 2]]}', '{"merges": [[4, 999]]}', '{"merges": [["a", 4]]}',
                          '{"merges": 3}',
                                     '{"merges": ' + str([[4, 4]] + [[i, i] for i in range(260, 290)]) + "}"])
def test_a_file_that_is_no_vocabulary_is_told_in_one_line(content, tmp_path):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(ValueError, match="is no vocabulary") as error:
        load_vocabulary(tmp_path / "v.json", 64)
    assert "\n" not in str(error.value)
