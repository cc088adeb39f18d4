"""The graders of the exercises: what they must reject and accept, and that no learner's code ends in a traceback of
ours. A few answers on one seed here; `python -m tests.tools.graders` tries all of them on twenty."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from exercises import grade, make, pool
from exercises.answers import variants
from exercises.cut import NoSuchName, Version, bodies_of, cut, put_in, version_with
from exercises.judge import (NUMBERS, answers, cut_of, exercise, known_mistakes, learners, prints, verdicts,
                             what_comes_out)
from plumbing.command import UserError
from tests.tools import mutants
from tests.tools.commands import ROOT
from tests.tools.graders import lines_cut, misjudged

TO_FILL_IN = [number for number in NUMBERS if cut_of(number)]


@pytest.mark.parametrize("number", TO_FILL_IN)
def test_planted_mistakes_are_rejected_unusual_answers_and_the_source_accepted(number):
    assert len(answers(number).WRONG) >= 6 and len(answers(number).RIGHT) >= 3
    assert misjudged(number, (11,), at_most=8) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_the_table_of_exercises_counts_what_is_planted(number):
    table = (ROOT / "exercises" / "README.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith(f"| {number} | "))
    _, title, lines, minutes, wrong, right, mutants_of, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert (title, int(minutes)) == (exercise(number).TITLE, exercise(number).MINUTES)
    planted = [int(count.split()[0]) for count in (wrong, right)]
    assert planted == [len(answers(number).WRONG), len(answers(number).RIGHT)]
    if cut_of(number):
        assert int(lines) == lines_cut(number)
        abouts = [about for about, _ in mutants.all_mutants(number)]
        count, same = map(int, mutants_of.split(";"))  # two mutants may be called the same, and one of them be rejected
        known = mutants.SAME.get(number, {})
        assert count == len(abouts) and len(known) <= same <= sum(about in known for about in abouts)


@pytest.mark.parametrize("number", TO_FILL_IN)
def test_planted_answers_are_python(number):
    """One that does not compile is rejected whatever the claims see."""
    for planted in (answers(number).WRONG, answers(number).RIGHT):
        for name, files in planted.items():
            for file, bodies in files.items():
                compile(put_in((ROOT / file).read_text(encoding="utf-8"), bodies), name, "exec")


@pytest.mark.parametrize("number", TO_FILL_IN)
def test_holes_are_rejected_and_said_to_be_holes(number):
    holes = {}
    for file, names in cut_of(number).items():
        text, taken = cut((ROOT / file).read_text(), names, number)
        compile(text, file, "exec")
        assert taken >= len(names)
        holes[file[:-3]] = f"work/{file}", text
    rows = verdicts(number, Version(holes), 3)
    assert not any(row["ok"] for row in rows) and any("not written yet" in row["why"] for row in rows)


def test_a_known_mistake_is_told_by_its_name():
    for name in ("softmax runs over the tokens, not over the layers", "one choice for the whole sentence"):
        assert known_mistakes(6, version_with(answers(6).WRONG[name], "x")) == [name]
    assert known_mistakes(6, Version()) == []


def test_a_right_answer_that_draws_otherwise_is_no_known_mistake_while_other_holes_are_open():
    files = {"diffusion.py": {**answers(4).RIGHT["independent times, moved afterwards"]["diffusion.py"],
                              "add_noise": "raise NotImplementedError('exercise 4: add_noise')"}}
    assert known_mistakes(4, version_with(files, "x")) == []
    files["diffusion.py"]["add_noise"] = "return z + noise"
    assert not any("generator" in name for name in known_mistakes(4, version_with(files, "x")))


def test_a_learners_file_may_have_another_form(tmp_path):
    text = (ROOT / "tokenizer.py").read_text()
    whole = "    def forward(self, x: Tensor) -> Tensor:\n        return x + self.mlp(x)\n"
    assert whole in text
    short = text.replace(whole, "    def forward(self, x: Tensor) -> Tensor: return x + self.mlp(x)\n")
    assert bodies_of(short, ["ResidualMLP.forward"]) == bodies_of(text, ["ResidualMLP.forward"])
    assert put_in(short, {"ResidualMLP.forward": "return x + self.mlp(x)"}) == text
    table = (ROOT / "train.py").read_text()
    for one, as_well in (("STAGES = [", "STAGES: list = ["), ("  RECONSTRUCTION | {", "  losses=RECONSTRUCTION | {")):
        other = table.replace(one, as_well, 1)
        assert other != table and bodies_of(other, ["STAGES.T1"]) == bodies_of(table, ["STAGES.T1"])
    (tmp_path / "train.py").write_text(cut(table, cut_of(2)["train.py"], 2)[0].replace("STAGES = [", "ROWS = ["))
    assert "the source: STAGES.T1" in grade.difference(2, {"train.py": tmp_path / "train.py"})


def test_another_error_than_a_hole_is_not_called_one():
    rows = verdicts(6, version_with({"router.py": {"DTR.weights": "return super().weights(H)"}}, "x"), 3)
    assert "NotImplementedError" in rows[0]["why"] and "not written" not in rows[0]["why"]


def test_no_small_change_of_the_routers_bodies_passes_unless_it_says_the_same():
    count, passed = mutants.survivors(6)
    assert count > 40 and set(passed) == mutants.SAME[6].keys()


@pytest.mark.parametrize("number", TO_FILL_IN)
def test_what_comes_out_is_the_same_after_all_claims_were_judged(number):
    """By it a mistake is told by its name, and a class's variant is judged."""
    judged, fresh = Version(), Version()
    verdicts(number, judged, 3)
    one, other = (prints(exercise(number), version, 4) for version in (judged, fresh))
    assert one.keys() == other.keys() == {name for names in cut_of(number).values() for name in names}
    assert all(value.equal(other[name]) for name, value in one.items())


def test_a_cut_leaves_all_other_lines_and_a_name_that_is_gone_is_one_line():
    source = (ROOT / "router.py").read_text()
    names = exercise(6).CUT["router.py"]
    text, taken = cut(source, names, 6)
    assert text.count("NotImplementedError") == source.count("NotImplementedError") + 4 and taken >= 4
    kept = [line for line in text.splitlines() if "exercise 6:" not in line]
    assert [line for line in source.splitlines() if line in kept] == kept
    assert put_in(text, bodies_of(source, names)) == source
    with pytest.raises(NoSuchName, match="has no DTR.heights any more"):
        cut(source, ["DTR.heights"], 6)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "WORK", tmp_path)
    return tmp_path


def fill_in(work, number, bodies=None):
    """The learner's copies with the real bodies, or others."""
    make.make(number, work)
    for file, names in cut_of(number).items():
        path = work / file
        path.write_text(put_in(path.read_text(), bodies or bodies_of((ROOT / file).read_text(), names)))
    return make.files_of(number, work)


def test_a_learners_file_is_graded_in_a_process_of_its_own(work):
    paths = fill_in(work, 6)
    result = grade.grade(6, 5, paths)
    assert result["passed"] and {row["why"] for row in result["claims"]} == {""} and result["seed"] == 5
    assert not grade.difference(6, paths)


@pytest.mark.parametrize("body, said", [
    ("while True:\n    pass", "took longer than"),
    ("import os\nos._exit(0)", "it ended early"),
    ("raise SystemExit(0)", "SystemExit"),
    pytest.param("return H.new_zeros(13 << 30, dtype=torch.uint8)", "can't allocate memory",
                 marks=pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")),
    ("print('x' * 10 ** 6)\nreturn None", "a tensor is wanted, not NoneType"),
    ("return input()", "EOFError")])
def test_code_that_hangs_ends_or_breaks_is_a_claim_that_fails(body, said, work):
    names = exercise(6).CUT["router.py"]
    bodies = bodies_of((ROOT / "router.py").read_text(), names) | {"DTR.weights": body}
    result = grade.grade(6, 1, fill_in(work, 6, bodies), 20 if "while" in body else 120)
    assert not result["passed"] and len(result["claims"]) == len(exercise(6).CLAIMS)
    assert said in " ".join(row["why"] for row in result["claims"])


def test_a_file_that_is_no_python_is_told(work):
    make.make(6, work)
    (work / "router.py").write_text("def layer_choice(:\n")
    result = grade.grade(6, 1, make.files_of(6, work))
    assert not result["passed"] and "SyntaxError" in result["claims"][0]["why"]


def test_another_exercise_of_the_same_file_puts_the_first_aside_and_brings_it_back(work):
    fill_in(work, 4)
    mine = (work / "diffusion.py").read_text()
    with pytest.raises(UserError, match="with your answers"):
        make.make(4, work)
    make.make(5, work)
    assert (work / "4" / "diffusion.py").read_text() == mine != (work / "diffusion.py").read_text()
    assert make.files_of(4, work)["diffusion.py"] == work / "4" / "diffusion.py"
    make.make(4, work)
    assert (work / "diffusion.py").read_text() == mine and (work / "5" / "diffusion.py").exists()
    questions = (work / "predictions.md").read_text()
    assert questions.count("\n## 4 ") == questions.count("\n## 5 ") == 1


def test_the_commands_say_what_is_missing_and_give_one_object():
    done = subprocess.run([sys.executable, "exercises/grade.py", "12"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: which exercise?")
    done = subprocess.run([sys.executable, "exercises/grade.py", "6", "--seed", "3", "--json", "--root", "."], cwd=ROOT,
                          capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["passed"] and found["exercise"] == 6 and found["seed"] == 3
    assert all(set(row) == {"claim", "ok", "why"} for row in found["claims"])


def test_of_all_exercises_json_is_a_list_and_one_that_fails_ends_in_1(monkeypatch, capsys):
    def graded(number, seed, paths):
        return {"exercise": number, "seed": seed, "claims": [], "passed": number != 7}

    monkeypatch.setattr(grade, "grade", graded)
    monkeypatch.setattr(sys, "argv", ["grade.py", "--all", "--json", "--seed", "3", "--root", str(ROOT)])
    with pytest.raises(SystemExit) as end:
        grade.main()
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out) == [graded(number, 3, {}) for number in TO_FILL_IN]


def test_an_answer_that_fails_ends_in_1_in_lines_and_as_json(tmp_path):
    for file in ("router.py", "diffusion.py"):
        shutil.copyfile(ROOT / file, tmp_path / file)
    wrong = tmp_path / "router.py"
    body = "return (self.gate(H[:, :, -1]) / self.temperature).softmax(1)"
    wrong.write_text(put_in(wrong.read_text(), {"DTR.weights": body}))

    def ask(*words):
        return subprocess.run([sys.executable, "exercises/grade.py", *words, "--root", str(tmp_path)], cwd=ROOT,
                              capture_output=True, text=True)

    done = ask("6", "--seed", "3")
    assert done.returncode == 1 and " FAIL  " in done.stdout and re.search(r"^\d of 12$", done.stdout, re.M)
    assert "yours computes what comes out if: " in done.stdout and "return self.gate" not in done.stdout
    done = ask("6", "--seed", "3", "--json")
    assert done.returncode == 1 and not json.loads(done.stdout)["passed"]
    work = tmp_path / "exercises" / "work"
    work.mkdir(parents=True)
    shutil.copyfile(ROOT / "router.py", work / "router.py")
    (work / make.MADE).write_text(json.dumps({"router.py": 6}))
    done = ask("6", "--seed", "3")  # what make.py wrote there goes before the root's own
    assert done.returncode == 0 and "Word for word the source." in done.stdout, done.stdout


def test_the_seed_decides_the_inputs(work):
    """A wrong answer is off by as much for the same seed, and by something else for another."""
    bodies = {"DTR.mix": "return Router.mix(self, H, w) * 1.5"}
    wrong = version_with({"router.py": bodies}, "mine")

    def why(seed: int) -> list[str]:
        return [row["why"] for row in verdicts(6, wrong, seed) if not row["ok"]]

    assert why(3) == why(3) != why(4) and len(why(3)) >= 2
    whole = bodies_of((ROOT / "router.py").read_text(), cut_of(6)["router.py"]) | bodies
    graded = grade.grade(6, 4, fill_in(work, 6, whole))
    assert [row["why"] for row in graded["claims"] if not row["ok"]] == why(4)


def test_a_script_runs_on_the_learners_file(tmp_path):
    script = ("import sys; sys.argv = ['exercises/run.py', '6', 'router.py']; sys.path[:0] = ['.']\n"
              "from exercises import make, run; from pathlib import Path\n"
              f"make.WORK = Path({str(tmp_path)!r}); make.files_of.__defaults__ = (make.WORK,)\n"
              "from plumbing.command import run_command; make.make(6, make.WORK); run_command(run.main)")
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "not written yet: exercise 6: layer_choice" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pack_for_a_class_has_holes_and_no_answers(tmp_path):
    mine = ROOT / "exercises" / "work" / "packed" / "answer.py"  # what a teacher tried is no pupil's
    mine.parent.mkdir(parents=True)
    try:
        mine.write_text("")
        make.pack(tmp_path, 0)
    finally:
        shutil.rmtree(mine.parent)
    student = tmp_path / "student"
    assert not (student / "exercises" / "answers").exists() and not (student / "tests" / "claims").exists()
    done = subprocess.run([sys.executable, "exercises/run.py", "10", "train.py", "--k", "9", "--out", "runs/x"],
                          cwd=student, capture_output=True, text=True)
    assert "cannot route 9 of 6 layers" in done.stderr  # the source itself, not the file with holes beside it
    assert (tmp_path / "teacher" / "exercises" / "answers" / "a06.py").exists()
    text = (student / "diffusion.py").read_text()
    assert all(f"exercise {number}: " in text for number in (4, 5, 9))
    for number in TO_FILL_IN:  # every body is a hole
        for file, names in cut_of(number).items():
            text, real = (student / file).read_text(), (ROOT / file).read_text()
            for name, body in bodies_of(text, names).items():
                assert body != bodies_of(real, [name])[name], name
                assert f"exercise {number}: {name}" in body or name.startswith("STAGES."), name
    assert not (student / "exercises" / "teacher.md").exists() and not (student / "exercises" / "work").exists()
    assert (tmp_path / "teacher" / "exercises" / "teacher.md").exists()

    def in_the_pack(*command):
        done = subprocess.run([sys.executable, *command], cwd=student, text=True, capture_output=True)
        assert "Traceback" not in done.stdout + done.stderr
        return done.stdout

    done = subprocess.run([sys.executable, "exercises/make.py", "--class", "out"], cwd=student, text=True,
                          capture_output=True)
    assert done.returncode == 2 and "a class's pack itself" in done.stderr and not (student / "out").exists()
    in_the_pack("exercises/make.py", "6")
    mine = student / "exercises" / "work" / "router.py"
    mine.write_text(put_in(mine.read_text(), bodies_of((ROOT / "router.py").read_text(), cut_of(6)["router.py"])))
    assert "exercise 6: " in (student / "router.py").read_text()  # its graders have the source all the same
    assert json.loads(in_the_pack("exercises/grade.py", "6", "--json"))["passed"]
    assert [n for n in NUMBERS if grade.begun(n, student)] == TO_FILL_IN
    assert grade.handed_in(6, student) == {"router.py": mine} and grade.handed_in(7, student) == {
        "mllm.py": student / "mllm.py"}


def test_a_project_is_not_packed_into_itself():
    with pytest.raises(UserError, match=r"--class \.\./class"):
        make.pack(ROOT / "class", 0)
    assert not (ROOT / "class").exists()


def test_in_a_pack_no_exercise_rests_on_anothers_holes_and_lines_are_those_of_the_learners_file(tmp_path):
    make.pack(tmp_path, 0)
    path, real = tmp_path / "student" / "diffusion.py", (ROOT / "diffusion.py").read_text()
    names = cut_of(4)["diffusion.py"]
    path.write_text(put_in(path.read_text(), bodies_of(real, names)))
    assert "exercise 5: " in path.read_text() and "exercise 9: " in path.read_text()
    assert learners(4, {"diffusion.py": path}) == {"diffusion": (str(path), real)}
    path.write_text(put_in(path.read_text(), {"guided": "return 1 / 0"}))  # below holes of exercise 9
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "1 / 0" in text)
    why = [row["why"] for row in verdicts(5, Version(learners(5, {"diffusion.py": path})), 0)]
    assert f"ZeroDivisionError: division by zero (diffusion.py:{line})" in why


def test_a_class_is_asked_for_something_else_and_the_source_does_not_pass(tmp_path):
    done = subprocess.run([sys.executable, "exercises/make.py", "--class", str(tmp_path), "--variant", "5"], cwd=ROOT,
                          text=True, capture_output=True)
    assert done.returncode == 0 and "in variant.txt how this class is graded" in done.stdout
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    wanted, told = variants.variant_of(6, 5), (teacher / "variant.txt").read_text()
    assert wanted.task in told
    assert {int(seed) for seed in re.findall(r"--seed (\d+)", told)} == {random.Random(5).getrandbits(31)}

    def grades(folder, *more):
        done = subprocess.run([sys.executable, "exercises/grade.py", "6", "--json", *more], cwd=folder, text=True,
                              capture_output=True)
        return [row["claim"][:23] for row in json.loads(done.stdout)["claims"] if not row["ok"]]

    subprocess.run([sys.executable, "exercises/make.py", "6"], cwd=student, check=True, capture_output=True)
    assert wanted.task in (student / "exercises" / "work" / "predictions.md").read_text()
    mine, right = student / "exercises" / "work" / "router.py", bodies_of((ROOT / "router.py").read_text(),
                                                                          cut_of(6)["router.py"])
    for bodies, wrong in ((right, ["otherwise in your class"]), (right | wanted.bodies["router.py"], [])):
        mine.write_text(put_in(mine.read_text(), bodies))
        assert grades(student) == wrong
    assert grades(teacher, "--root", "../student") == []
    done = subprocess.run([sys.executable, "-m", "tests.tools.graders", "--seeds", "1", "6"], cwd=teacher, text=True,
                          capture_output=True)
    assert "31 of 31 | 6 of 6" in done.stdout and "misjudged" not in done.stdout


def test_every_variant_differs_from_the_source_and_drops_claims_that_exist():
    for number in TO_FILL_IN:
        names, tasks, seen = {claim.__name__ for claim in exercise(number).CLAIMS}, set(), set()
        for k in range(1, 21):
            one = variants.variant_of(number, k)
            tasks.add(one.task)
            assert set(one.dropped) < names and one == variants.variant_of(number, k)
            for file, bodies in one.bodies.items():
                source = (ROOT / file).read_text()
                assert bodies.keys() <= set(cut_of(number)[file]) and put_in(source, bodies) != source
            if one.task in seen:
                continue
            seen.add(one.task)
            told, real = (what_comes_out(number, bodies, [7])[7] for bodies in (one.bodies, {}))
            assert any(not torch.equal(told[name], real[name]) for name in told), (number, k, "as the source")
        assert len(tasks) >= 2 and variants.variant_of(number, 0) is None


def test_the_sheet_of_exercise_10_comes_empty_and_an_empty_one_is_told_line_by_line(work):
    lines = make.make(10, work)
    sheet = work / "sheet.json"
    assert str(sheet) in lines[0] and set(json.loads(sheet.read_text())) >= {"question", "prediction", "verdict"}
    told = (work / make.PREDICTIONS).read_text()
    assert all(f"`{line}`" in told for line in exercise(10).SHEET) and exercise(10).PREDICT[0] in told
    rows = exercise(10).verdicts([str(work), str(sheet), "--control", str(work)])
    assert not any(row["ok"] for row in rows) and all(row["why"] for row in rows)
    with pytest.raises(UserError, match="move it away"):
        make.make(10, work)


def test_pupils_of_one_run_are_seeds_of_one_arm(tmp_path):
    for pupil in (1, 2, 3):
        for name, change in (("control", {}), ("arm", {"lambda_s": 0.0})):
            (tmp_path / f"{name}{pupil}.json").write_text(json.dumps(
                {"protocol": {"version": 1}, "ablation": {"reseed": pupil, **change},
                 "reconstruction": {"psnr": 30.0 + pupil / 10 + len(change)}}))
    control, arms = pool.pool("reconstruction.psnr", sorted(tmp_path.glob("arm*")), sorted(tmp_path.glob("control*")))
    assert control.values == [30.1, 30.2, 30.3]
    assert [(arm.label, len(arm.values)) for arm in arms] == [("lambda_s 0.0", 3)]
    assert pool.verdict(arms[0], control) == "higher"
