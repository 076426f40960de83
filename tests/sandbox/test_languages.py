"""Programs in other languages, honest and hostile, at both levels; as far as they are installed."""

import dataclasses
import os
import subprocess
import time
from pathlib import Path

import pytest

from sandbox import languages
from sandbox.probe import try_level
from sandbox.records import Case, Limits, Result, StdinTest
from sandbox.service import Sandbox

COMPILED = ("typescript", "c", "cpp", "java", "go", "csharp", "rust")
OTHERS = languages.LANGUAGES[1:]
# Generous: these tests run beside others, and nothing here is about speed.
PATIENT = Limits(seconds=60.0, processes=128)
HURRIED = Limits(seconds=3.0, processes=128)

# Reads two numbers and a line of text; prints the sum, and the text reversed, on two lines.
HONEST = {
    "javascript": """
const lines = require('fs').readFileSync(0, 'utf8').split('\\n');
const [a, b] = lines[0].split(' ').map(Number);
console.log(a + b);
console.log([...lines[1]].reverse().join(''));
""",
    "typescript": """
import * as fs from 'fs';
const lines: string[] = fs.readFileSync('/dev/stdin', 'utf8').split('\\n');
const [a, b]: number[] = lines[0].split(' ').map(Number);
enum Side { Left, Right }
console.log(a + b + Side.Left);
console.log([...lines[1]].reverse().join(''));
""",
    "bash": """
read -r a b
read -r text
echo $((a + b))
reversed=
for ((i = ${#text} - 1; i >= 0; i--)); do reversed+=${text:i:1}; done
echo "$reversed" | cat
""",
    "c": """
#include <math.h>
#include <stdio.h>
#include <string.h>
int main(void) {
    long a, b; char text[100] = "";
    if (scanf("%ld %ld %99s", &a, &b, text) < 2) return 1;
    printf("%ld\\n", (long)floor(a + b + 0.5));
    for (int i = (int)strlen(text); i--;) putchar(text[i]);
    putchar('\\n');
}
""",
    "cpp": """
#include <bits/stdc++.h>
int main() {
    long a, b; std::string text;
    std::cin >> a >> b >> text;
    std::cout << a + b << std::endl << std::string(text.rbegin(), text.rend()) << '\\n';
}
""",
    "java": """
import java.util.*;
public final class Solution {
    record Pair(long a, long b) {}
    public static void main(String[] args) {
        Scanner in = new Scanner(System.in);
        Pair p = new Pair(in.nextLong(), in.nextLong());
        System.out.println(p.a() + p.b());
        System.out.println(new StringBuilder(in.next()).reverse());
    }
}
""",
    "go": """
package main
import ("bufio"; "fmt"; "os")
func main() {
    var a, b int; var text string
    in := bufio.NewReader(os.Stdin)
    fmt.Fscan(in, &a, &b, &text)
    fmt.Println(a + b)
    runes := []rune(text)
    for i := len(runes) - 1; i >= 0; i-- { fmt.Print(string(runes[i])) }
    fmt.Println()
}
""",
    "php": """<?php
[$a, $b] = explode(' ', trim(fgets(STDIN)));
echo $a + $b, "\\n", strrev(trim(fgets(STDIN))), ctype_digit('1') ? "\\n" : "?";
""",
    "csharp": """
using System; using System.Linq;
class Program {
    static void Main() {
        var n = Console.ReadLine().Split(' ').Select(long.Parse).ToArray();
        Console.WriteLine(n[0] + n[1]);
        Console.WriteLine(new string(Console.ReadLine().Reverse().ToArray()));
    }
}
""",
    "rust": """
use std::io::Read;
fn main() {
    let mut all = String::new();
    std::io::stdin().read_to_string(&mut all).unwrap();
    let mut words = all.split_whitespace();
    let a: i64 = words.next().unwrap().parse().unwrap();
    let b: i64 = words.next().unwrap().parse().unwrap();
    println!("{}", a + b);
    println!("{}", words.next().unwrap().chars().rev().collect::<String>());
}
""",
}
HONEST_TESTS = (
    StdinTest("4 5\nabc\n", "9\ncba\n"),
    StdinTest("-1 1\nx\n", "0\nx"),
    StdinTest("1000000 1\nstressed\n", "1000001\ndesserts\n"),
)
WRONG = StdinTest("4 5\nabc\n", "9\nabc\n")

# What each language calls its commonest accidents. Body of the program only; `program` wraps it.
WRAPPED = {
    "javascript": "{}",
    "typescript": "{}",
    "bash": "{}",
    "c": "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <unistd.h>\n"
    "#include <sys/types.h>\n#include <sys/socket.h>\nint main(void) {{ {} }}",
    "cpp": "#include <bits/stdc++.h>\n#include <unistd.h>\n#include <sys/socket.h>\n"
    "int main() {{ {} }}",
    "java": "import java.util.*;\nclass Main {{ public static void main(String[] a) "
    "throws Exception {{ {} }} }}",
    "go": 'package main\nimport ("fmt"; "os"; "net"; "os/exec")\nvar _ = fmt.Sprint\n'
    "var _ = os.Exit\nvar _ = net.Dial\nvar _ = exec.Command\nfunc main() {{ {} }}",
    "php": "<?php {}",
    "csharp": "using System; using System.IO; using System.Collections.Generic;\n"
    "class P {{ static void Main() {{ {} }} }}",
    "rust": "#![allow(unused)]\nfn main() {{ {} }}",
}
BROKEN = {
    "javascript": "let x = ;",
    "typescript": "const x: number = 'text'; console.log(x);",
    "bash": "if true; then",
    "c": "int x = undeclared;",
    "cpp": "std::vector<int> v = 1;",
    "java": "int x = true;",
    "go": "x := 1",
    "php": "echo 1 +;",
    "csharp": "int x = true;",
    "rust": "let x: i32 = true;",
}
RAISES = {
    "javascript": "throw new Error('boom');",
    "typescript": "throw new Error('boom');",
    "bash": "echo boom >&2; exit 3",
    "c": 'fprintf(stderr, "boom"); return 3;',
    "cpp": 'std::cerr << "boom"; return 3;',
    "java": 'throw new RuntimeException("boom");',
    "go": 'panic("boom")',
    "php": "throw new Exception('boom');",
    "csharp": 'throw new Exception("boom");',
    "rust": 'panic!("boom");',
}
CRASHES = {
    "bash": ("kill -SEGV $$", "SIGSEGV"),
    "c": ("volatile int *p = 0; return *p;", "SIGSEGV"),
    "cpp": ("std::abort();", "SIGABRT"),
    "rust": ("std::process::abort();", "SIGABRT"),
    "javascript": ("process.abort();", "SIGABRT"),
}
LOOPS = {
    "javascript": "for (;;);",
    "typescript": "for (;;);",
    "bash": "while :; do :; done",
    "c": "for (volatile int i = 0;; i++);",
    "cpp": "for (volatile int i = 0;;) i = i + 1;",
    "java": "for (;;);",
    "go": "for {}",
    "php": "for (;;);",
    "csharp": "for (;;);",
    "rust": "loop {}",
}
FLOODS = {
    "javascript": "const s = 'x'.repeat(65536);"
    " for (;;) try { require('fs').writeSync(1, s); } catch (e) {}",
    "typescript": "const s = 'x'.repeat(65536);"
    " for (;;) try { require('fs').writeSync(1, s); } catch (e) {}",
    "bash": "while :; do echo xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; done",
    "c": 'for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");',
    "cpp": 'for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");',
    "java": 'for (;;) System.out.print("x".repeat(65536));',
    "go": "for { os.Stdout.Write(make([]byte, 65536)) }",
    "php": "for (;;) echo str_repeat('x', 65536);",
    "csharp": "for (;;) Console.Write(new string('x', 65536));",
    "rust": 'loop { print!("{}", "x".repeat(65536)); }',
}
HOGS = {
    "javascript": "const all = []; for (;;) all.push(new Array(1e5).fill(all.length));",
    "typescript": "const all: any[] = []; for (;;) all.push(Buffer.alloc(1 << 24, 1));",
    "bash": "x=xxxxxxxxxxxxxxxx; for ((;;)); do x=$x$x; done",
    "c": "for (;;) { char *p = malloc(1 << 24); if (!p) return 1; memset(p, 1, 1 << 24); }",
    "cpp": "std::vector<std::vector<char>> v; for (;;) v.emplace_back(1 << 24, 'x');",
    "java": "List<byte[]> l = new ArrayList<>(); for (;;) l.add(new byte[1 << 24]);",
    "go": "var l [][]byte; for { b := make([]byte, 1<<24);"
    " for i := range b { b[i] = 1 }; l = append(l, b) }",
    "php": "$l = []; for (;;) $l[] = str_repeat('x', 1 << 24);",
    "csharp": "var l = new List<byte[]>(); for (;;) { var b = new byte[1 << 24];"
    " for (int i = 0; i < b.Length; i += 4096) b[i] = 1; l.Add(b); }",
    "rust": "let mut l = Vec::new(); loop { l.push(vec![1u8; 1 << 24]); }",
}
SAYS_OOM = ("javascript", "cpp", "java", "go", "php", "csharp", "rust")
READS = {
    "javascript": "try { console.log(require('fs').readFileSync(PATH, 'utf8')); }"
    " catch (e) { console.log('no'); }",
    "typescript": "try { console.log(require('fs').readFileSync(PATH, 'utf8')); }"
    " catch (e) { console.log('no'); }",
    "bash": "cat PATH 2>&- || echo no",
    "c": 'FILE *f = fopen(PATH, "r"); char b[99] = "no"; if (f) fgets(b, 99, f); puts(b);',
    "cpp": 'std::ifstream f(PATH); std::string s = "no"; if (f) f >> s; puts(s.c_str());',
    "java": "try { System.out.println(java.nio.file.Files.readString(java.nio.file.Path.of(PATH)));"
    ' } catch (java.io.IOException e) { System.out.println("no"); }',
    "go": 'b, err := os.ReadFile(PATH); if err != nil { b = []byte("no") }; fmt.Println(string(b))',
    "php": "echo @file_get_contents(PATH) ?: 'no';",
    "csharp": "try { Console.WriteLine(File.ReadAllText(PATH)); }"
    ' catch (Exception) { Console.WriteLine("no"); }',
    "rust": 'println!("{}", std::fs::read_to_string(PATH).unwrap_or("no".into()));',
}
CONNECTS = {
    "bash": "(echo > /dev/tcp/127.0.0.1/PORT) 2>&- && echo yes || echo no",
    "c": 'puts(socket(AF_INET, SOCK_STREAM, 0) < 0 ? "no" : "yes");',
    "cpp": 'puts(socket(AF_UNIX, SOCK_STREAM, 0) < 0 ? "no" : "yes");',
    "javascript": "require('net').connect(PORT, '127.0.0.1', () => console.log('yes'))"
    ".on('error', () => console.log('no'));",
    "java": 'try { new java.net.Socket("127.0.0.1", PORT); System.out.println("yes"); }'
    ' catch (java.io.IOException e) { System.out.println("no"); }',
    "go": 'if _, err := net.Dial("tcp", "127.0.0.1:PORT"); err != nil { fmt.Println("no") }'
    ' else { fmt.Println("yes") }',
    "php": "echo @fsockopen('127.0.0.1', PORT) ? 'yes' : 'no';",
    "rust": 'println!("{}", if std::net::TcpStream::connect("127.0.0.1:PORT").is_ok()'
    ' { "yes" } else { "no" });',
}
ORPHANS = {
    "bash": "(exec -a MARK setsid sleep 300 >&- 2>&- <&-) & echo ok",
    "c": 'if (!fork()) { setsid(); if (!fork()) execl("/bin/sleep", "MARK", "300", NULL); _exit(0);'
    ' } usleep(200000); puts("ok");',
    "javascript": "require('child_process').spawn('sleep', ['300'], "
    "{argv0: 'MARK', detached: true, stdio: 'ignore'}).unref(); console.log('ok');",
}


def program(language: str, body: str) -> str:
    return WRAPPED[language].format(body)


@pytest.fixture(scope="module", params=["namespace", "landlock"])
def sandbox(request):
    reason = try_level(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with Sandbox(request.param, workers=1) as made:
        yield made


def installed(sandbox: Sandbox, language: str) -> None:
    """Skip, with what to install, if the sandbox does not have the language."""
    if language not in sandbox._workers[0]._zygote("programs").languages:
        pytest.skip(languages.advice(language))


def judge(
    sandbox: Sandbox,
    language: str,
    code: str,
    *tests: StdinTest,
    limits: Limits = PATIENT,
) -> Result:
    installed(sandbox, language)
    tests = tests or (StdinTest("", ""),)
    case = Case(id="x", language=language, code=code, stdin_tests=tests, limits=limits)
    result = sandbox.run([case])[0]
    assert result.status == "ran", result
    return result


def each(table) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("language", list(table))


def test_the_tables_of_this_file_name_every_language():
    assert set(OTHERS) == set(HONEST) == set(WRAPPED) == set(BROKEN) == set(LOOPS) == set(HOGS)
    assert {r.language for r in languages.RUNNERS if r.compile} == set(COMPILED)


@each(OTHERS)
def test_honest_programs_pass_their_tests_and_no_others(sandbox, language):
    result = judge(sandbox, language, HONEST[language], *HONEST_TESTS, WRONG)
    assert [test.verdict for test in result.tests] == ["pass", "pass", "pass", "fail"], result
    assert result.tests[3].message == "the output differs"


@each(OTHERS)
def test_a_program_that_does_not_compile(sandbox, language):
    tests = (StdinTest("", ""), StdinTest("", "x"))
    result = judge(sandbox, language, program(language, BROKEN[language]), *tests)
    assert [test.verdict for test in result.tests] == ["fail", "fail"], result
    if language in COMPILED:
        assert result.tests[0].message.startswith("compile error: ")
        assert result.tests[0] == result.tests[1]


@each(OTHERS)
def test_an_exit_status_fails(sandbox, language):
    test = judge(sandbox, language, program(language, RAISES[language])).tests[0]
    assert test.verdict == "fail" and test.message.startswith("exit status "), test
    assert "boom" in test.message, test


@each(CRASHES)
def test_signals_are_crashes(sandbox, language):
    code, name = CRASHES[language]
    test = judge(sandbox, language, program(language, code)).tests[0]
    assert (test.verdict, name in test.message) == ("crash", True), test


@each(OTHERS)
def test_endless_loops_time_out(sandbox, language):
    code = program(language, LOOPS[language])
    assert judge(sandbox, language, code, limits=HURRIED).tests[0].verdict == "timeout"


@each(OTHERS)
def test_floods_are_cut_off(sandbox, language):
    limits = dataclasses.replace(PATIENT, output_kib=1024)
    result = judge(sandbox, language, program(language, FLOODS[language]), limits=limits)
    assert result.tests[0].verdict == "output_limit"


@each(OTHERS)
def test_memory_is_bounded(sandbox, language):
    limits = dataclasses.replace(PATIENT, memory_mib=256)
    test = judge(sandbox, language, program(language, HOGS[language]), limits=limits).tests[0]
    assert test.verdict == "oom" if language in SAYS_OOM else test.verdict != "pass", test


@each(OTHERS)
def test_host_files_are_out_of_reach(sandbox, language, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    secret.chmod(0o644)
    for path in (str(secret), "/etc/passwd"):
        quoted = path if language == "bash" else f'"{path}"'
        code = program(language, READS[language].replace("PATH", quoted))
        result = judge(sandbox, language, code, StdinTest("", "no"))
        assert result.pass_rate == 1.0, (path, result)


@each(CONNECTS)
def test_there_is_no_network(sandbox, language):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        code = program(language, CONNECTS[language].replace("PORT", port))
        result = judge(sandbox, language, code, StdinTest("", "no"))
    assert result.pass_rate == 1.0, result


@each(ORPHANS)
def test_orphans_die_with_their_test(sandbox, language):
    mark = f"unmask-orphan-{os.getpid()}-{time.monotonic_ns()}"
    code = program(language, ORPHANS[language].replace("MARK", mark))
    result = judge(sandbox, language, code, StdinTest("", "ok"))
    assert result.pass_rate == 1.0, result
    assert mark not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("cat /dev/stdin", "4"),
        ("cat < /dev/fd/0", "4"),
        ("read -r x < <(echo 5); cat <(echo $x)", "5"),
        ("echo 6 > /dev/stdout; echo 7 > /dev/stderr", "6"),
    ],
)
def test_bash_has_the_devices_it_leans_on(sandbox, code, stdout):
    result = judge(sandbox, "bash", code, StdinTest("4", stdout))
    assert result.pass_rate == 1.0, result


PROC = {
    "processes": "for p in /proc/[0-9]*; do [ ${p##*/} = $$ ] || echo $p; done",
    "kernel": "ls /proc/sys /proc/meminfo /proc/cmdline /proc/kallsyms /proc/net/tcp 2>&-",
    "first": "cat /proc/1/environ /proc/1/cmdline /proc/1/maps 2>&-; ls /proc/1/fd 2>&-",
    "hidden": "ls -A /hidden /hidden/proc /hidden/proc/1 2>&-",
    "mounts": "(mount -t proc p /tmp || umount /hidden || umount -l /proc) 2>&- && echo yes",
    "environment": "tr '\\0' '\\n' < /proc/self/environ |"
    " grep -vE '^(PATH|HOME|TMPDIR|LANG|_|SHLVL|PWD|OLDPWD)='",
}


@pytest.mark.parametrize("name", PROC)
def test_a_proc_of_its_own_shows_nothing_of_others(sandbox, name):
    if sandbox.backend != "namespace":
        pytest.skip("this level has none")
    result = judge(sandbox, "bash", PROC[name] + "\ntrue", StdinTest("", ""))
    assert result.pass_rate == 1.0, result


LEAKS = {
    "include": ("c", '#include "SECRET"\nint main(void) {}'),
    "include_passwd": ("c", '#include "/etc/passwd"\nint main(void) {}'),
    "incbin": ("c", '__asm__(".incbin \\"SECRET\\"");\nint main(void) {}'),
    "include_bytes": ("rust", 'fn main() { println!("{}", include_str!("SECRET")); }'),
    "reference": ("typescript", '/// <reference path="SECRET" />\nimport "SECRET";'),
    "embed": ("go", 'package main\nimport _ "embed"\n//go:embed SECRET\nvar s string\n'
              "func main() { print(s) }"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_compilers_cannot_read_the_host(sandbox, name, tmp_path):
    secret = tmp_path / "secret.h"
    secret.write_text("unguessable: the answer is 42\n")
    language, code = LEAKS[name]
    test = judge(sandbox, language, code.replace("SECRET", str(secret))).tests[0]
    assert test.verdict == "fail", test
    assert "unguessable" not in test.message and "root:" not in test.message


COMPILE_BOMBS = {
    "template_recursion": (
        "cpp",
        "template<int n, int m> struct F {"
        " static const int v = F<n - 1, m>::v + F<n - 1, m + n>::v; };\n"
        "template<int m> struct F<0, m> { static const int v = m; };\n"
        "int main() { return F<900, 0>::v; }",
    ),
    "huge_array": ("c", "char a[4000000000L] = {1};\nint main(void) { return a[5]; }"),
    "huge_repetition": ("c", '__asm__(".rept 2000000000\\n.quad 1\\n.endr");\nint main(void) {}'),
    "include_itself": ("c", '#include "main.c"\n#include "main.c"\nint main(void) {}'),
    "macros": (
        "c",
        "#define A x x x x x x x x x x\n#define B A A A A A A A A A A\n"
        "#define C B B B B B B B B B B\n#define D C C C C C C C C C C\n"
        "#define E D D D D D D D D D D\n#define F E E E E E E E E E E\n"
        "#define G F F F F F F F F F F\n#define H G G G G G G G G G G\nint main(void) { H; }",
    ),
    "dev_zero": ("c", '#include "/dev/zero"\nint main(void) {}'),
}


@pytest.mark.parametrize("name", COMPILE_BOMBS)
def test_compile_bombs_end(sandbox, name, monkeypatch):
    language, code = COMPILE_BOMBS[name]
    short = [dataclasses.replace(row, compile_seconds=8.0) for row in languages.RUNNERS]
    monkeypatch.setattr("sandbox.programs.RUNNERS", tuple(short))
    limits = dataclasses.replace(HURRIED, seconds=5.0)
    tests = (StdinTest("", ""), StdinTest("", "x"))
    result = judge(sandbox, language, code, *tests, limits=limits)
    assert {test.verdict for test in result.tests} <= {"fail", "timeout"}, result
    assert {test.message.partition(" ")[0] for test in result.tests} <= {"compile", "compiling"}
    honest = judge(sandbox, "c", HONEST["c"], *HONEST_TESTS)
    assert honest.pass_rate == 1.0


def test_a_compile_timeout_is_a_timeout_of_every_test(sandbox, monkeypatch):
    short = [dataclasses.replace(row, compile_seconds=0.05) for row in languages.RUNNERS]
    monkeypatch.setattr("sandbox.programs.RUNNERS", tuple(short))
    limits = dataclasses.replace(PATIENT, seconds=0.05)
    result = judge(sandbox, "cpp", HONEST["cpp"], *HONEST_TESTS, limits=limits)
    assert [test.verdict for test in result.tests] == ["timeout"] * 3
    assert result.tests[0].message == "compiling took more than 0.05 s"


def test_compiled_once_and_run_in_fresh_jails(sandbox):
    code = program(
        "c",
        'FILE *f = fopen("left", "r"); puts(f ? "left" : "fresh"); puts(__TIME__);'
        ' f = fopen("left", "w"); fputs("x", f); fclose(f); return access("main.c", F_OK) == 0;',
    )
    installed(sandbox, "c")
    started = []
    zygote = sandbox._workers[0]._zygote("programs")
    run = zygote.run
    zygote.run = lambda role, *rest: (started.append(role), run(role, *rest))[1]
    result = judge(sandbox, "c", code, *[StdinTest("", "fresh\n00:00:00")] * 3)
    del zygote.run
    assert started == ["compile", "execute", "execute", "execute"]
    # Only the time differs: no test sees what another left, nor the source.
    assert {test.message for test in result.tests} == {"the output differs"}
    code = code.replace("puts(__TIME__);", "")
    assert judge(sandbox, "c", code, *[StdinTest("", "fresh")] * 3).pass_rate == 1.0


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ('puts("8");', "pass"),  # does not read its stdin
        ("close(0); close(2); puts(\"8\");", "pass"),
        ('puts("8"); return 1;', "fail"),
        ('puts("8\\xff");', "fail"),
        ('puts("8"); if (!fork()) for (;;) pause();', "pass"),
        ('puts("8"); fflush(stdout); abort();', "crash"),
        ('puts("8"); fflush(stdout); kill(getpid(), SIGKILL);', "exited"),
        ('puts("8"); fflush(stdout); raise(SIGPIPE);', "crash"),
        ('kill(1, SIGINT); kill(getppid(), SIGTERM); usleep(100000); puts("8");', "pass"),
        ("execl(\"/bin/true\", \"true\", NULL);", "fail"),
        ("for (int fd = 3; fd < 300; fd++) write(fd, \"0\", 1); puts(\"7\");", "fail"),
        ("for (int fd = 3; fd < 300; fd++) write(fd, \"0\", 1); return 3;", "fail"),
        ("while (fork() >= 0); for (;;) pause();", "timeout"),
        ("for (;;) { char b[9999]; if (write(2, b, 9999) < 0) return 1; }", "timeout"),
    ],
)  # fmt: skip
def test_endings_of_c_programs(sandbox, code, verdict):
    limits = HURRIED if verdict == "timeout" else PATIENT
    code = "#include <signal.h>\n" + program("c", code)
    test = judge(sandbox, "c", code, StdinTest("4\n" * 100_000, "8"), limits=limits).tests[0]
    assert test.verdict == verdict, test


@pytest.mark.parametrize("language", ["c", "javascript", "java", "bash"])
def test_four_megabytes_of_honest_output(sandbox, language):
    text = "".join(f"{i} line of honest output\n" for i in range(150_000))
    assert len(text) > 4_000_000
    code = {
        "c": program("c", "int c; while ((c = getchar()) != EOF) putchar(c);"),
        "javascript": "process.stdout.write(require('fs').readFileSync('/dev/stdin'));",
        "java": program("java", "System.in.transferTo(System.out); System.out.flush();"),
        "bash": "cat",
    }[language]
    limits = dataclasses.replace(Limits(), seconds=60.0)  # the others are the defaults
    result = judge(sandbox, language, code, StdinTest(text, text), limits=limits)
    assert result.pass_rate == 1.0, result


@pytest.mark.parametrize(
    "code",
    [
        "package a.b;\npublic class It { public static void main(String[] a)"
        ' { System.out.print("8"); } }',
        "abstract class Base { abstract int f(); }\n"
        "class Main extends Base { class Inner {} int f() { return 8; }\n"
        "public static void main(String[] a) { System.out.print(new Main().f()); } }",
        "// public class Other\n/*\npublic class Comment {}\n*/ class Main {}",
        "public class " + "A" * 5000 + " {}",
    ],
)
def test_which_java_class_is_run(sandbox, code):
    result = judge(sandbox, "java", code, StdinTest("", "8"))
    assert (result.pass_rate == 1.0) is ('"8"' in code or "return 8" in code), result


def test_setup_is_text_before_the_program(sandbox):
    installed(sandbox, "c")
    case = Case(
        id="x",
        language="c",
        setup="#include <stdio.h>\n#define ANSWER 42",
        code='int main(void) { printf("%d", ANSWER); }',
        stdin_tests=(StdinTest("", "42"),),
        limits=PATIENT,
    )
    assert sandbox.run([case])[0].pass_rate == 1.0


@pytest.mark.parametrize("level", ["namespace", "landlock"])
def test_no_process_file_or_descriptor_is_left(level, tmp_path, monkeypatch):
    if try_level(level) is not None:
        pytest.skip(f"no {level} here")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, children = len(os.listdir("/proc/self/fd")), _children()
    with Sandbox(level, workers=1) as sandbox:
        judge(sandbox, "c", HONEST["c"], *HONEST_TESTS)
        judge(sandbox, "c", program("c", LOOPS["c"]), limits=HURRIED)
        judge(sandbox, "c", program("c", ORPHANS["c"]))
        judge(sandbox, "c", program("c", BROKEN["c"]))
        assert _children() - children
    assert len(os.listdir("/proc/self/fd")) <= before
    assert not list(tmp_path.iterdir())
    assert not _children() - children


def _children() -> set[str]:
    listings = Path("/proc/self/task").glob("*/children")
    return {pid for listing in listings for pid in listing.read_text().split()}


def test_a_missing_toolchain_is_no_verdict(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with Sandbox(workers=1) as sandbox:
        case = Case(id="x", language="go", code="", stdin_tests=(StdinTest("", ""),))
        result = sandbox.run([case])[0]
        honest = dataclasses.replace(case, language="python", code="")
        assert sandbox.run([honest])[0].pass_rate == 1.0
    assert (result.status, result.total) == ("invalid_case", 0)
    assert result.message == "language 'go': no go within reach; install golang-go"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"language": "cobol"}, "use one of python, javascript, typescript"),
        ({"language": "c", "stdin_tests": (), "tests": ("assert 1",)}, "give stdin_tests"),
        ({"language": "c", "stdin_tests": ()}, "no tests"),
        ({"float_tolerance": 0}, "float_tolerance"),
        ({"float_tolerance": float("nan")}, "float_tolerance"),
        ({"float_tolerance": True}, "float_tolerance"),
        ({"float_tolerance": "1e-6"}, "float_tolerance"),
        ({"float_tolerance": 1e-6, "stdin_tests": (), "tests": ("assert 1",)}, "float_tolerance"),
    ],
)
def test_what_cannot_be_judged_says_why(changes, text):
    case = Case(id="x", code="", stdin_tests=(StdinTest("", ""),))
    assert text in (dataclasses.replace(case, **changes).problem() or "")


@pytest.mark.parametrize(("tolerance", "verdict"), [(None, "fail"), (1e-6, "pass")])
def test_float_tolerance_is_the_cases(sandbox, tolerance, verdict):
    case = Case(
        id="x",
        code="print(0.1 + 0.2)",
        stdin_tests=(StdinTest("", "0.3"),),
        limits=PATIENT,
        float_tolerance=tolerance,
    )
    assert sandbox.run([case])[0].tests[0].verdict == verdict


def test_toolchains_are_found_by_path_alone(tmp_path):
    folder = tmp_path / "tools" / "bin"
    folder.mkdir(parents=True)
    for name in ("gcc", "node"):
        (folder / name).write_text("#!/bin/sh\necho version 18.4.1\n")
        (folder / name).chmod(0o755)
    found = languages.find(str(folder))
    assert set(found) == {"c", "javascript"}  # and no typescript: this node is too old
    assert found["c"].tools == {"gcc": str(folder / "gcc")}
    assert found["c"].folders == (str(folder.parent),)
    assert languages.versions(str(folder))["c"] == "18.4.1"


def test_a_newer_node_strips_types_itself(tmp_path):
    tool = tmp_path / "node"
    tool.write_text("#!/bin/sh\necho v22.18.0\n")
    tool.chmod(0o755)
    found = languages.find(str(tmp_path))
    assert set(found) == {"javascript", "typescript"}
    assert not found["typescript"].runner.compile


def test_a_home_directory_is_never_a_toolchain(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in ("bin", ".local/bin", "opt/node/bin"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "node").write_text("#!/bin/sh\n")
        (folder / "node").chmod(0o755)
    for place, readable in (
        ("bin", "bin"),
        (".local/bin", ".local/bin"),
        ("opt/node/bin", "opt/node"),
    ):
        found = languages.find(str(tmp_path / place))
        assert found["javascript"].folders == (str(tmp_path / readable),)
