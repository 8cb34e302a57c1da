"""What kills a process of its own at one call to the system after another."""

COUNTED = """
import os, signal, sys
left = int(sys.argv[1])
def counted(call):
    def wrapper(*args, **how):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **how)
    return wrapper
"""
