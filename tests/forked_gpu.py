"""A host that lends its GPU: `spaces.GPU` as far as the page sees it, with a process really forked for each call."""

import inspect
import multiprocessing
import threading
import types

import gradio as gr

_FORK = multiprocessing.get_context("fork")
_END = "end"


def fake_spaces(asked: list[int]) -> types.ModuleType:
    """Make a stand-in for the package.

    Args:
        asked: Gets the seconds that each call asks for.
    """

    def lend(*, duration):
        def decorate(task):
            def stream(*arguments):
                asked.append(duration(*arguments))
                yield from _call(task, arguments)

            def call(*arguments):
                return next(iter(list(stream(*arguments))))

            return stream if inspect.isgeneratorfunction(task) else call

        return decorate

    module = types.ModuleType("spaces")
    module.GPU = lend
    return module


def _call(task, arguments):
    there, back, left = _FORK.SimpleQueue(), _FORK.SimpleQueue(), _FORK.Event()
    process = _FORK.Process(target=_serve, args=(task, there, back, left), daemon=True)
    process.start()
    threading.Thread(target=there.put, args=(arguments,), daemon=True).start()  # pickled, as everything that goes over
    try:
        while (answer := back.get()) != (_END, None):
            kind, value = answer
            if kind == "error":  # the host keeps the kind of an error and drops its text
                raise gr.Error(value)
            yield value
    finally:
        left.set()
        process.kill()
        process.join()


def _serve(task, there, back, left):
    try:
        result = task(*there.get())
        for value in result if inspect.isgeneratorfunction(task) else [result]:
            if left.is_set():
                return
            back.put(("value", value))
        back.put((_END, None))
    except Exception as error:
        back.put(("error", type(error).__name__))
