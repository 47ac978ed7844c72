"""Calls of Keras models that JAX compiles as a whole, on the backend that KERAS_BACKEND names."""

import keras

BACKEND = keras.config.backend()


def stateless(model, function):
    """For JAX: a function of the model's variables and arrays to the output and the variables."""

    def call(state, *arrays):
        with keras.StatelessScope(zip(model.variables, state, strict=True)) as scope:
            output = function(*arrays)
        return output, [scope.get_current_value(variable) for variable in model.variables]

    return call


def compiled(model, function):
    """`function` of arrays, which calls `model`; JAX would compile operation by operation."""
    if BACKEND != "jax":
        return function
    import jax

    step = jax.jit(stateless(model, function))

    def call(*arrays):
        output, state = step([variable.value for variable in model.variables], *arrays)
        for variable, value in zip(model.variables, state, strict=True):
            variable.assign(value)
        return output

    return call
