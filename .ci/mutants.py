"""Plant small faults in a module, one at a time; see which of them the tests notice.

`make mutants MODULES="sae core" SAMPLE=60`; without MODULES all of them, without SAMPLE
every fault. The faults are those of mutmut's operators and two of ours. Its own runner
passes over every decorated function, starts anew for each fault and knows no notebooks;
this one imports once what is slow, and forks. A fork imports the altered module and
runs the test files that import it (as `make test` runs them; few examples a property),
then the lessons of its chapter (as nbdev-test runs them: no type checks), the quickest
test first, up to the first that fails. All happens in copies of the checkout.

Results stay in runs/mutants: MODULE.jsonl, a line for each fault; MODULE.diff, the
survivors. A run goes on where the last one ended. A fault once noticed counts while its
statement is the same; survivors are tried again when a test or the package changed;
`rm -r runs/mutants` forgets all. The order of the faults is random and fixed: SAMPLE
takes the first.

What is said to people or is a choice gets no faults: docstrings, formatted strings and
strings with a space, messages of `check` and `raise`, prints, warnings, progress bars,
pictures (`plot_...`, `fig....`); annotations, imports, decorators, `__all__`; defaults
of parameters and fields. Nor do faults that any call would meet with an error: an
argument left out so that others move up; None for an argument, but for an only one that
is a literal, such as the 1 of `sum(1)`; None for a local name. A string is altered in
one way. A fault that changes nothing that matters is named in .ci/equivalent.txt (a
line for each: its name, a space, the reason); it does not count."""
import argparse, ast, difflib, hashlib, json, os, re, resource, shutil, signal
import subprocess, sys, tempfile, time
from collections import Counter
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Iterator, NamedTuple

os.environ.update(OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1', IN_TEST='1',
                  MONOSEM_DEVICE='cpu')

import libcst as cst
import pytest
from mutmut.mutation import mutators

ROOT = Path(__file__).parents[1]
OUT = ROOT/'runs/mutants'
MODULES = '''core checkpoints planted corpus tokens transformer hooked activations sae active kernels training
             resampling evaluation features proxies steering'''.split()
HEAVY = '''torch numba pandas plotly.graph_objects scipy.stats scipy.optimize hypothesis
           beartype jaxtyping transformer_lens nbdev.showdoc IPython.display'''
MINUTES = {'test_kill', 'test_cli'}  # they start processes
SLOW_S = 4        # of processors: a test that takes longer is left out; lessons are not
PATIENCE_S = 40   # and so is one that takes longer by the clock
EXAMPLES = 20     # of a property
MEMORY = 8*2**30  # bytes of addresses that a fault may take


# --- faults ---

def code(node:cst.CSTNode) -> str: return cst.Module([]).code_for_node(node)


def called(node:cst.CSTNode) -> str:
    "What a call calls: `check`, `bar.update`."
    return code(node.func) if isinstance(node, cst.Call) else ''


def argument(node:cst.Call) -> Iterator[cst.Call]:
    "Leave one out, so that none moves up; an only literal becomes None."
    if called(node) in ('len', 'isinstance', 'hasattr'): return
    n, placed = len(node.args), [a for a in node.args if not a.keyword and not a.star]
    every = list(mutators.operator_arg_removal(node))
    if n == 1 and literal(node.args[0].value): yield from every
    for new in every:
        gone = [a for a in node.args if a not in new.args]
        if len(new.args) == n-1 and gone[0] not in placed[:-1]: yield new


def literal(node:cst.BaseExpression) -> bool:
    numbers = (cst.BaseNumber, cst.UnaryOperation, cst.Tuple)
    return isinstance(node, numbers) or code(node) in ('True', 'False')


def assignment(node:cst.Assign) -> Iterator[cst.Assign]:
    "What an object or a table holds becomes None."
    kept = isinstance(node.targets[0].target, (cst.Attribute, cst.Subscript))
    if kept: yield from mutators.operator_assignment(node)


def string(node:cst.BaseString) -> list[cst.BaseString]:
    "A word gets other ends."
    word = isinstance(node, cst.SimpleString) and ' ' not in node.value
    return list(mutators.operator_string(node))[:1] if word else []


def negated(node:cst.If|cst.While|cst.CompIf) -> Iterator[cst.CSTNode]:
    "Ours: the other branch."
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(cst.Not(), test))


def forgotten(node:cst.Expr) -> Iterator[cst.Expr]:
    "Ours: a reset, a check, an update in place does not happen."
    if isinstance(node.value, cst.Call): yield cst.Expr(cst.Ellipsis())


INSTEAD = {mutators.operator_arg_removal: argument, mutators.operator_string: string,
           mutators.operator_assignment: assignment}
OPERATORS = [(kind, INSTEAD.get(f, f)) for kind, f in mutators.mutation_operators]
OPERATORS += [((cst.If, cst.While, cst.CompIf), negated), (cst.Expr, forgotten)]

NEVER = (cst.Raise, cst.Annotation, cst.AnnAssign, cst.Param, cst.Import,
         cst.ImportFrom, cst.Decorator, cst.FormattedString)
SAID = re.compile(r'progress|print|warn|(warnings|tqdm|bar|fig|plotting)\.\w+')
NAMED = (cst.FunctionDef, cst.ClassDef)


def untouched(node:cst.CSTNode) -> bool:
    "What is said to people or is a choice."
    if isinstance(node, cst.FunctionDef): return node.name.value.startswith('plot_')
    if isinstance(node, cst.Assign): return code(node).startswith('__')
    alone = node.value if isinstance(node, cst.Expr) else None
    if isinstance(alone, cst.BaseString): return True
    return isinstance(node, NEVER) or bool(SAID.fullmatch(called(alone or node)))


class Faults(cst.CSTVisitor):
    "Collects (where, operator, node, what stands there instead)."
    def __init__(self): self.found, self.where = [], []

    def on_visit(self, node):
        if isinstance(node, NAMED): self.where.append(node.name.value)
        if untouched(node): return False
        if called(node) == 'check':  # the condition; the rest is its message
            node.args[0].visit(self)
            return False
        where = '.'.join(self.where)
        for f in (f for kind, f in OPERATORS if isinstance(node, kind)):
            self.found += [(where, f.__name__, node, new) for new in f(node)]
        return True

    def on_leave(self, node):
        if isinstance(node, NAMED): self.where.pop()


class Fault(NamedTuple):
    "A statement of a module with a fault in it."
    id: str        # The same as long as the statement is
    where: str     # Function or class
    operator: str
    before: str    # Of the module, up to the statement
    new: str
    after: str

    @property
    def source(self) -> str: return self.before+self.new+self.after


def faults(source:str) -> list[Fault]:
    "Every fault of a module, in an order that is random and fixed."
    module, at, out = cst.MetadataWrapper(cst.parse_module(source)).module, 0, {}
    for statement in module.body:
        old, visitor = module.code_for_node(statement), Faults()
        at = source.index(old, at)
        statement.visit(visitor)
        for where, operator, node, altered in visitor.found:
            new = module.code_for_node(statement.deep_replace(node, altered))
            id = digest(f'{old}\n{new}'.encode())
            fault = Fault(id, where, operator, source[:at], new, source[at+len(old):])
            if differs(old, new): out[id] = fault
    return [out[id] for id in sorted(out)]


def digest(what:bytes) -> str: return hashlib.sha256(what).hexdigest()[:8]


def differs(old:str, new:str) -> bool:
    "Whether a text is Python and means something else than another."
    try: compile(new, '', 'exec')
    except SyntaxError: return False
    return ast.dump(ast.parse(old)) != ast.dump(ast.parse(new))


def diff(source:str, fault:Fault, module:str) -> str:
    before, after = source.splitlines(), fault.source.splitlines()
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=''))[2:]
    return '\n'.join([f'# {fault.id} {module}.{fault.where} {fault.operator}', *lines])


# --- tests ---

SETTINGS = '_hypothesis_internal_use_settings'


class Plan:
    "A pytest plugin: which tests, the quickest first; what each takes, which fail."
    def __init__(self,
        seconds:dict[str, float]|None=None, # Test to its processor time; None runs all
    ):
        self.seconds, self.took, self.failed, self.skipped = seconds, {}, [], []

    def pytest_collection_modifyitems(self, items):
        for item in items:
            if s := getattr(item.obj, SETTINGS, None):
                few = type(s)(s, max_examples=min(EXAMPLES, s.max_examples))
                setattr(item.obj, SETTINGS, few)
        if self.seconds is None: return
        chosen = [i for i in items if i.nodeid in self.seconds]
        items[:] = sorted(chosen, key=lambda i: self.seconds[i.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start = sum(os.times()[:4])
        if self.seconds is None and not item.get_closest_marker('lessons'):
            signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f'{PATIENCE_S} s'))
            signal.alarm(PATIENCE_S)
        try: return (yield)
        finally:
            signal.alarm(0)
            self.took[item.nodeid] = sum(os.times()[:4])-start

    def pytest_runtest_logreport(self, report):
        if report.failed: self.failed.append(report.nodeid)
        if report.skipped: self.skipped.append(report.nodeid)


def concerned(module:str) -> list[list[str]]:
    "Arguments of pytest for a module: its tests, its lessons."
    files = [p for p in sorted(ROOT.glob('tests/test_*.py')) if p.stem not in MINUTES]
    imports = re.compile(rf'\bmonosem\.{module}\b')
    named = [p for p in files if imports.search(p.read_text(encoding='utf-8'))]
    tests = [f'tests/{p.name}' for p in named]
    lesson = f'tests/test_lessons.py::test_lessons[{module}]'
    return [tests]*bool(tests)+[['-o', 'addopts=', '-m', 'lessons', lesson]]


def limit(seconds:dict[str, float]) -> int:
    "Processor time after which a fault hangs."
    return int(15+3*sum(seconds.values()))


def session(copy:Path, args:list[str], plan:Plan) -> None:
    "Run pytest in this process, a fork, and write what came of it."
    os.setsid()
    os.chdir(copy)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    planted, hard = plan.seconds is not None, resource.RLIM_INFINITY
    log, tmp = os.open('log', os.O_WRONLY|os.O_CREAT|os.O_TRUNC), copy/'tmp'
    for stream in (1, 2): os.dup2(log, stream)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if planted: resource.setrlimit(resource.RLIMIT_CPU, (limit(plan.seconds), hard))
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    tempfile.tempdir = str(tmp)
    os.environ.update(TMPDIR=str(tmp), PYTHONPATH=str(copy))
    sys.path[0] = str(copy)
    sys.dont_write_bytecode = planted  # two faults can share a file's size and second
    options = ['-q', '--tb=short', '-p', 'no:cacheprovider', '--hypothesis-profile=ci',
               f'--basetemp={tmp}/pytest']+['-x']*planted
    status = int(pytest.main(options+args, plugins=[plan]))
    found = getattr(sys.modules.get('monosem'), '__file__', str(copy))
    r = dict(status=status, took=plan.took, failed=plan.failed, skipped=plan.skipped,
             ours=found.startswith(str(copy)))
    (copy/'report').write_text(json.dumps(r))


def start(copy:Path, args:list[str], plan:Plan):
    "A fork that runs `session`."
    (copy/'report').unlink(missing_ok=True)
    process = get_context('fork').Process(target=session, args=(copy, args, plan))
    process.start()
    return process


def end(process) -> None:
    "End a fork and what it started."
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass  # all have ended, or it has no group yet
    process.kill()
    process.join()


def report(copy:Path) -> dict:
    "What a session wrote; one that died wrote nothing."
    path = copy/'report'
    died = dict(status=-1, took={}, failed=[], skipped=[], ours=True)
    r = json.loads(path.read_text()) if path.exists() else died
    if not r['ours']: raise RuntimeError('got monosem from outside the copy.')
    return r


class Step(NamedTuple):
    "One call of pytest."
    args: list[str]
    seconds: dict[str, float]


def baseline(copy:Path, module:str) -> list[Step]:
    "The tests that pass without a fault, and what each takes."
    steps = []
    for args in concerned(module):
        process = start(copy, args, Plan())
        try: process.join()
        finally: end(process)
        r = report(copy)
        if r['status'] > 1 or r['status'] < 0: print((copy/'log').read_text()[-2000:])
        for t in r['failed']: print(f'  fails without a fault, left out: {t}')
        out = {*r['failed'], *r['skipped']}
        passed = {t: s for t,s in r['took'].items() if t not in out}
        quick = {t: s for t,s in passed.items() if s <= SLOW_S or 'lessons[' in t}
        for t in passed.keys()-quick: print(f'  takes {passed[t]:.0f} s, left out: {t}')
        if quick: steps.append(Step(args, quick))
    for old in (copy/'monosem/__pycache__').glob(f'{module}.cpython*'): old.unlink()
    if not steps: raise RuntimeError(f'no test of {module} passes; mend that first.')
    for s in steps: print(f'  {len(s.seconds)} tests {sum(s.seconds.values()):.1f} s')
    return steps


# --- runs ---

def checkout(to:Path) -> Path:
    "A copy of the files that git knows or would."
    command = ['git', 'ls-files', '-coz', '--exclude-standard']
    names = subprocess.check_output(command, cwd=ROOT, text=True)
    for n in filter(None, names.split('\0')):
        if (ROOT/n).is_file():
            (to/n).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT/n, to/n, follow_symlinks=False)
    return to


def known_results(path:Path) -> dict[str, dict]:
    "Fault to its last result."
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {r['id']: r for r in rows}


def equivalent() -> set[str]:
    path = ROOT/'.ci/equivalent.txt'
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return {line.split()[0] for line in lines if line.strip()}


def state(copy:Path) -> str:
    "A hash of what survivors depend on."
    kinds = ('tests/*.py', 'monosem/*.py', 'nbs/*.ipynb')
    return digest(b''.join(p.read_bytes() for k in kinds for p in sorted(copy.glob(k))))


class Trial:
    "A fault in a copy, taken through the steps."
    def __init__(self, copy:Path, module:str, fault:Fault, steps:list[Step]):
        self.copy, self.fault, self.steps = copy, fault, list(steps)
        (copy/f'monosem/{module}.py').write_text(fault.source, encoding='utf-8')
        self.since = time.monotonic()
        self._next()

    def _next(self) -> None:
        step = self.steps.pop(0)
        self.until = time.monotonic()+60+10*limit(step.seconds)
        self.process = start(self.copy, step.args, Plan(step.seconds))

    def result(self) -> dict|None:
        "What came of it, when it has ended."
        if self.process.is_alive() and time.monotonic() < self.until: return None
        late = self.process.is_alive() or self.process.exitcode == -signal.SIGXCPU
        end(self.process)
        r = report(self.copy)
        if r['status'] == 0 and self.steps: return self._next()
        outcome = 'timeout' if late else 'survived' if r['status'] == 0 else 'killed'
        id, where, operator, *_ = self.fault
        return dict(id=id, outcome=outcome, by=(r['failed'] or [None])[0], where=where,
                    operator=operator, seconds=round(time.monotonic()-self.since, 1))


def attempt(todo:list[Fault], module:str, steps:list[Step], copies:list[Path]):
    "Yield a result for each fault; as many run at a time as there are copies."
    todo, running = iter(todo), {}
    try:
        while True:
            for copy in copies:
                trial = running.pop(copy, None)
                if trial and (r := trial.result()):
                    yield r
                    trial = None
                if not trial and (fault := next(todo, None)):
                    trial = Trial(copy, module, fault, steps)
                if trial: running[copy] = trial
            if not running: return
            connection.wait([t.process.sentinel for t in running.values()], timeout=1)
    finally:
        for trial in running.values(): end(trial.process)


def run(module:str, sample:int|None, jobs:int) -> dict:
    "Plant the faults of a module and count."
    named, known = equivalent(), known_results(OUT/f'{module}.jsonl')
    with tempfile.TemporaryDirectory(prefix='mutants_') as tmp:
        copy = checkout(Path(tmp)/'0')
        source = (copy/f'monosem/{module}.py').read_text(encoding='utf-8')
        every, now = faults(source), state(copy)
        chosen = every[:sample]
        counted = [f for f in chosen if f.id not in named]
        survived = {i for i,r in known.items() if r['outcome'] == 'survived'}
        again = {i for i in survived if known[i]['state'] != now}
        todo = [f for f in counted if f.id not in known.keys()-again]
        print(f'{module}: {len(every)} faults, {len(chosen)} chosen, {len(todo)} left')
        try:
            if todo: try_all(todo, module, copy, jobs, now, known)
        finally: show(OUT/f'{module}.diff', counted, known, module, source)
    outcomes = Counter(known[f.id]['outcome'] for f in counted)
    return dict(module=module, faults=len(every), chosen=len(chosen),
                equivalent=len(chosen)-len(counted), **outcomes)


def try_all(todo:list[Fault], module:str, copy:Path, jobs:int, now:str, known:dict):
    "Put the results into `known` and the log, and tell, as they come."
    steps = baseline(copy, module)
    copies = [copy, *(copy.with_name(str(i)) for i in range(1, jobs))]
    for other in copies[1:]: shutil.copytree(copy, other, symlinks=True)
    began, n = time.monotonic(), len(todo)
    with (OUT/f'{module}.jsonl').open('a') as log:
        for i, r in enumerate(attempt(todo, module, steps, copies), 1):
            known[r['id']] = r = r | dict(state=now)
            print(json.dumps(r), file=log, flush=True)
            if r['outcome'] != 'killed' or i in (20, n) or i % 50 == 0:
                each = (time.monotonic()-began)/i
                what = f"{r['outcome']} {r['id']} {module}.{r['where']} {r['operator']}"
                print(f'  {i}/{n}, {each:.1f} s each: {what}')


def show(path:Path, faults:list[Fault], known:dict, module:str, source:str) -> None:
    "Write the survivors as differences."
    left = [f for f in faults if known.get(f.id, {}).get('outcome') == 'survived']
    text = '\n\n'.join(diff(source, f, module) for f in left)
    path.write_text(text+'\n', encoding='utf-8')


def table(rows:list[dict]) -> str:
    columns = 'module faults chosen equivalent killed timeout survived'.split()
    values = [[r.get(c, 0) for c in columns]+[share(r)] for r in rows]
    lines = [columns+['noticed'], *values]
    return '\n'.join(''.join(f'{v:>12}' for v in line) for line in lines)


def share(r:dict) -> str:
    "Killed or timed out, of those that count."
    n = r['chosen']-r['equivalent']
    return f'{1-r.get("survived", 0)/n:.0%}' if n else '-'


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('modules', nargs='*', metavar='MODULE', help=' '.join(MODULES))
    p.add_argument('--sample', type=int, help='how many faults of each')
    p.add_argument('--jobs', type=int, default=2)
    a = p.parse_args()
    if wrong := set(a.modules)-set(MODULES): p.error(f'{wrong} are none of {MODULES}')
    for name in HEAVY.split(): __import__(name)
    OUT.mkdir(parents=True, exist_ok=True)
    print(table([run(m, a.sample, a.jobs) for m in a.modules or MODULES]))
    print(f'survivors: {OUT.relative_to(ROOT)}/*.diff')


if __name__ == '__main__':
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped'))
    main()
