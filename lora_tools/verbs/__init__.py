"""One file a verb: read, plan, work tensor by tensor, write, report."""
