# SPDX-License-Identifier: GPL-2.0
"""Run tests in the host and print KTAP, watching the host's kernel log."""

import glob
import os
import re
import selectors
import subprocess
import time
import traceback

# What the kernel prints when something is wrong, and not otherwise.
TROUBLE = re.compile(
    r"WARNING:|BUG:|kernel BUG|KFENCE|KASAN|UBSAN|KCSAN|Oops|RIP:|refcount_t|kmemleak:|"
    r"rcu.*stall|soft lockup|hard LOCKUP|blocked for more than|possible recursive locking|"
    r"circular locking|inconsistent lock state|suspicious RCU|sleeping function called|"
    r"scheduling while atomic|general protection|Call Trace|list_(add|del) corruption|"
    r"Bad page|bad page|rust_kernel: panicked|bio.*too big|leaked|DEBUG_LOCKS_WARN_ON|"
    r"ODEBUG|slab.*(corrupt|Objects remaining)|Objects remaining|page_pool|"
    r"Trying to (write|free)|attempt to access beyond end")

# Not trouble: what the kernel prints of itself at boot or of a slow machine.
HARMLESS = re.compile(r"kfence: initialized|kmemleak: Kernel memory leak detector initialized|"
                      r"kmemleak: Automatic memory scanning|KASAN: .*initialized|"
                      r"KernelAddressSanitizer initialized|clocksource|"
                      r"rcu: .*stall.*(timeout|cputime)|Lock dependency validator")


def say(text):
    """Print a diagnostic line."""
    for line in str(text).splitlines() or [""]:
        print(f"# {line}", flush=True)


def expect(what, found, wanted):
    """Fail unless both are equal."""
    if found != wanted:
        raise AssertionError(f"{what}: {found!r}, expected {wanted!r}")


# What vhost-blk prints of itself when it is loaded and unloaded.
LOADING = re.compile("vhost_blk: (loaded|unloaded)")


class Log:
    """What the kernel has printed since this was made."""

    def __init__(self, mark=True):
        self.mark = None
        if mark:
            # A mark of our own, since old lines may fall out of the buffer.
            self.mark = f"vhost-blk-test: {time.monotonic_ns()}"
            with open("/dev/kmsg", "w", encoding="ascii") as file:
                file.write(f"<6>{self.mark}\n")

    def lines(self):
        """The lines since then, or all that are left if the mark is gone."""
        log = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace",
                             check=True).stdout.splitlines()
        for index, line in enumerate(log):
            if self.mark and line.endswith(self.mark):
                return log[index + 1:]
        return log

    def trouble(self):
        """Lines that report trouble."""
        return [line for line in self.lines()
                if TROUBLE.search(line) and not HARMLESS.search(line)]

    def ours(self):
        """Lines that vhost-blk prints; not those of the kernel about it."""
        return [line for line in self.lines()
                if re.search(r"\] *vhost[_-]blk[ :]", line)
                and not re.search("-test:|taints kernel|module verification failed", line)]


class Test:
    """A name, which says what is checked, and a function that raises if not.

    prints: how many lines of vhost-blk's own the kernel log gains, of which 0 leaves out those that it prints
    when it is loaded and unloaded, as a test may have to. None: any.
    long: it takes minutes, and runs only where all or the long tests are asked for.
    """

    def __init__(self, name, function, prints=0, long=False):
        self.name = name
        self.function = function
        self.prints = prints
        self.long = long


def test(function, **options):
    """A test from a function whose docstring's first line is its name."""
    return Test(function.__doc__.splitlines()[0].rstrip("."), function, **options)


def add_options(parser):
    """The options that say which tests to run."""
    parser.add_argument("--length", choices=("short", "long", "all"), default="short",
                        help="run all tests but the long ones, or those only, or all")
    parser.add_argument("--first", type=int, default=1,
                        help="the number of the first test to run (1); those before it in its file are run, "
                        "too, for what they leave behind")
    parser.add_argument("only", nargs="*", help="run tests whose name contains one of these")


def same_file(tests):
    """Whether tests are of one file."""
    return len({each.function.__module__ for each in tests}) == 1


def attempt(function, explain):
    """Run a test's function; returns what it raised, or None. Prints that."""
    try:
        function()
    except Exception as error:  # whatever it is, the others still run
        say(f"{type(error).__name__}: {error}")
        say("at " + " <- ".join(f"{frame.name}:{frame.lineno}" for frame
                                in reversed(traceback.extract_tb(error.__traceback__))))
        explain()
        return error
    return None


def run(tests, options, explain=lambda: None, again=lambda error: False):
    """Run the tests that the options say; returns 0 if all pass, otherwise 1.

    explain: prints what may help, called after a test that failed.
    again: whether a test that raised this, a guest's reset, is to be run again, once.
    """
    tests = [each if isinstance(each, Test) else test(each) for each in tests]
    tests = [each for each in tests
             if (options.length == "all" or each.long == (options.length == "long"))
             and (not options.only or any(word in each.name for word in options.only))]
    print("KTAP version 1", flush=True)
    print(f"1..{len(tests)}", flush=True)
    failed = 0
    begin_with = options.first
    while begin_with > 1 and same_file(tests[begin_with - 2:begin_with]):
        begin_with -= 1
    for number, each in enumerate(tests, 1):
        if number < begin_with:
            continue
        log = Log()
        begin = time.monotonic()
        error = attempt(each.function, explain)
        if error is not None and again(error):
            say("running this test again: the guest was reset, and its kernel did not say why")
            error = attempt(each.function, explain)
        good = error is None
        trouble = log.trouble()
        ours = [line for line in log.ours() if each.prints or not LOADING.search(line)]
        if trouble:
            good = False
            say("the host's kernel reports trouble:")
            say("\n".join(log.lines()[-60:]))
        elif each.prints is not None and len(ours) != each.prints:
            good = False
            say(f"vhost-blk printed {len(ours)} lines, expected {each.prints}:")
            say("\n".join(ours))
        say(f"{time.monotonic() - begin:.0f} s")
        result = f"{'ok' if good else 'not ok'} {number} {each.name}"
        if number < options.first:
            say(f"again: {result}")
            continue
        failed += not good
        print(result, flush=True)
    return 1 if failed else 0


def stacks(pid):
    """Where in the kernel the threads of a process are."""
    text = []
    for path in sorted(glob.glob(f"/proc/{pid}/task/*/stack")):
        try:
            with open(os.path.dirname(path) + "/comm", encoding="ascii", errors="replace") as file:
                name = file.read().strip()
            with open(path, encoding="ascii", errors="replace") as file:
                frames = [line.split()[-1] for line in file]
            text.append(f"  {path.split('/')[4]} {name}: {' '.join(frames)}")
        except OSError:
            continue
    return "\n".join(text)


def program(*command, timeout=300):
    """Run a program that prints KTAP, as a subtest; fails if any of it fails.

    timeout: seconds without a line of output.
    """
    print(f"# Subtest: {os.path.basename(command[0])}", flush=True)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    plan, passed, failed, last = None, 0, 0, "its start"
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    os.set_blocking(process.stdout.fileno(), False)
    pending = b""
    while True:
        if not selector.select(timeout):
            where = stacks(process.pid)
            process.kill()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                where += "\nand it cannot be killed"
            raise TimeoutError(f"nothing for {timeout} s after: {last}\n{where}")
        data = os.read(process.stdout.fileno(), 65536)
        if not data:
            break
        *lines, pending = (pending + data).split(b"\n")
        for line in (line.decode(errors="replace").rstrip() for line in lines):
            if not line:
                continue
            if re.match(r"(not )?ok \d+", line):
                failed += line.startswith("not ")
                passed += line.startswith("ok ")
            elif match := re.match(r"1\.\.(\d+)", line):
                plan = int(match.group(1))
            elif not line.startswith(("#", "KTAP", "  ")):
                line = f"# {line}"
            last = line
            print(f"  {line}", flush=True)
    status = process.wait()
    if failed:
        raise AssertionError(f"{failed} of {passed + failed} failed")
    if plan is None or passed != plan:
        raise AssertionError(f"{passed} results of {plan} planned; status {status}; last: {last}")
    if status:
        raise AssertionError(f"all passed, but the status is {status}")
