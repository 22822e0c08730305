"""Run a kernel on every thread of an OpenMP team: machine code calls machine code, so no thread of the team takes the GIL."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import excinfo_ptr_t
from numba.extending import intrinsic

from deformconv.runtime.addresses import machine_code
from deformconv.runtime.cache import kernel
from deformconv.runtime.simd import INT, data_and_type, element
from deformconv.runtime.threads import LEFT, NEXT, STOP, counters

if TYPE_CHECKING:
    from deformconv.runtime.openmp import Team

__all__ = ["compile_for_teams", "run_on_team"]

_BYTES = ir.IntType(8).as_pointer()
_NUMBER = ir.IntType(32)
_SECONDS = ir.DoubleType()
_NONE_LEFT = 1 << 62  # more than any number of items


class _Start(NamedTuple):
    """What a kernel is started with on a team, all int64."""

    started: Any  # how many threads the team has, at most
    threads: Any  # how many of them work
    parallel: Any  # the address of GOMP_parallel
    thread_number: Any  # that of omp_get_thread_num
    clock: Any  # that of omp_get_wtime
    function: Any  # the kernel's


_addresses: dict[tuple[Any, ...], int] = {}


def run_on_team(
    compiled: Any,
    arguments: tuple[Any, ...],
    kind: tuple[Any, ...],
    items: int,
    *,
    threads: int,
    burst: int,
    team: Team,
) -> None:
    """`threads.run` on a team: do `items` items of a kernel's work, and raise whatever any thread raised.

    `compiled` is the kernel, called with (counter, limit, thread) and `arguments`, whose types `kind` stands for. The caller
    takes `burst` items at a time: in between Python can handle a signal. The whole team starts, though only `threads` of it
    work, as PyTorch's operations do it: a runtime ends threads that a smaller team has no use for, and starts them anew.
    """
    runtime = team.runtime
    assert runtime is not None  # threads of our own do not come here
    counter = counters()
    address = _addresses.get((compiled, *kind))
    if address is None:
        address = _addresses[(compiled, *kind)] = machine_code(compiled, (counter, burst, 0, *arguments))
    start = tuple(_Start(team.started, threads, runtime.parallel, runtime.thread_number, runtime.clock, address))
    first = 0
    while first < items:
        began = time.perf_counter()
        waited = _launch(start, (counter, burst, 0, *arguments))
        left = min(int(counter[LEFT]), items)
        runtime.note(waited, (time.perf_counter() - began - waited) * threads / (left - first))
        counter[NEXT] = first = left


def compile_for_teams(compiled: Any) -> None:
    """Compile, or load, what it takes to run a kernel on a team, for all types of arguments that the kernel is compiled for."""
    for signature in compiled.signatures:
        _launch.compile((types.UniTuple(types.int64, len(_Start._fields)), types.BaseTuple.from_types(signature)))


@kernel
def _launch(start, arguments):
    """Call a kernel on a team as `start` says, a _Start as a tuple, and return the seconds that the caller has waited for it.

    The first three `arguments` of the kernel are (counter, limit, thread). The caller, who is thread 0, takes `limit` items at
    the most. When it has done, no other thread takes another one, and `counter[LEFT]` is the number of the first item that
    nobody has taken. The caller waits from its own last item to the others'. What a thread raises ends the others' work too,
    and is raised here.
    """
    return _call_on_team(start, arguments)


@intrinsic
def _call_on_team(typing, start, arguments):
    def emit(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        start, values = (cgutils.unpack_tuple(builder, packed) for packed in given)
        called = _Start(*start)
        task = _Task(context, signature.args[1].types)
        place = task.store(builder, [*start, *values])
        body = _member(task, builder.module)
        kind = ir.FunctionType(ir.VoidType(), [body.type, _BYTES, _NUMBER, _NUMBER])
        begin = builder.inttoptr(called.parallel, kind.as_pointer())
        builder.call(begin, [body, builder.bitcast(place, _BYTES), builder.trunc(called.started, _NUMBER), _NUMBER(0)])
        code, excinfo, ended = task.outcome(builder, place)
        status = context.call_conv._get_return_status(builder, code, excinfo)
        with builder.if_then(status.is_error, likely=False):
            context.call_conv.return_status_propagate(builder, status)
        return builder.fsub(_now(builder, called.clock), ended)

    return types.float64(start, arguments), emit


def _now(builder: Any, clock: Any) -> Any:
    """The seconds that the function at an address returns."""
    return builder.call(builder.inttoptr(clock, ir.FunctionType(_SECONDS, []).as_pointer()), [])


class _Task:
    """What the team's threads are handed: what the kernel is started with, and its arguments.

    And room for what they leave behind: the status and the exception of a thread that raised one, and when the caller had
    no work left.
    """

    def __init__(self, context: Any, kinds: Any) -> None:
        self.context, self.kinds = context, kinds

    def store(self, builder: Any, values: list[Any]) -> Any:
        self.count = len(values)
        kind = ir.LiteralStructType([*(value.type for value in values), _NUMBER, excinfo_ptr_t, _SECONDS])
        place = cgutils.alloca_once(builder, kind)
        for number, value in enumerate([*values, _NUMBER(0), ir.Constant(excinfo_ptr_t, None), _SECONDS(0)]):
            builder.store(value, self._field(builder, place, number))
        self.type = place.type
        return place

    def load(self, builder: Any, place: Any) -> tuple[_Start, list[Any]]:
        values = [builder.load(self._field(builder, place, number)) for number in range(self.count)]
        return _Start(*values[: len(_Start._fields)]), values[len(_Start._fields) :]

    def outcome(self, builder: Any, place: Any) -> list[Any]:
        """The status, what describes the exception if it is one, and when the caller had ended."""
        return [builder.load(self._field(builder, place, self.count + number)) for number in range(3)]

    def end(self, builder: Any, place: Any, seconds: Any) -> None:
        """Note when the caller has ended."""
        builder.store(seconds, self._field(builder, place, self.count + 2))

    def fail(self, builder: Any, place: Any, status: Any) -> None:
        """Note an exception, if it is the first."""
        code = self._field(builder, place, self.count)
        found = builder.cmpxchg(code, _NUMBER(0), status.code, "acq_rel", "acquire")
        with builder.if_then(builder.extract_value(found, 1)):
            builder.store(status.excinfoptr, self._field(builder, place, self.count + 1))

    def _field(self, builder: Any, place: Any, number: int) -> Any:
        return cgutils.gep_inbounds(builder, place, 0, number)


def _member(task: _Task, module: Any) -> Any:
    """The function that every thread of the team calls."""
    context = task.context
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_BYTES]), module.get_unique_name("member"))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    place = builder.bitcast(function.args[0], task.type)
    start, (counter, limit, _, *others) = task.load(builder, place)
    asks = ir.FunctionType(_NUMBER, []).as_pointer()
    thread = builder.sext(builder.call(builder.inttoptr(start.thread_number, asks), []), INT)
    with builder.if_then(builder.icmp_signed(">=", thread, start.threads)):
        builder.ret_void()
    first = builder.icmp_signed("==", thread, INT(0))
    limit = builder.select(first, limit, INT(_NONE_LEFT))
    kind = context.call_conv.get_function_type(types.none, task.kinds)
    status, _ = context.call_conv.call_function(
        builder, builder.inttoptr(start.function, kind.as_pointer()), types.none, task.kinds, [counter, limit, thread, *others]
    )
    counters, _ = data_and_type(context, builder, task.kinds[0], counter)
    with builder.if_then(status.is_error, likely=False):
        task.fail(builder, place, status)
        builder.store(INT(1), element(builder, counters, INT(STOP)))
    with builder.if_then(builder.or_(first, status.is_error)):
        left = builder.atomic_rmw("xchg", element(builder, counters, INT(NEXT)), INT(_NONE_LEFT), "acq_rel")
        with builder.if_then(first):
            builder.store(left, element(builder, counters, INT(LEFT)))
            task.end(builder, place, _now(builder, start.clock))
    builder.ret_void()
    return function
