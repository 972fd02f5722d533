"""Forms of a group, and names for its layers."""


def names(count):
    return [f"blocks.{i}.proj" for i in range(count)]


def apart(count):
    return tuple((i,) for i in range(count))


def whole(count):
    return (tuple(range(count)),)
