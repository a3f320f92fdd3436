"""The load generators: curl, wrk, and sockets of our own where neither fits. They know no contender."""
