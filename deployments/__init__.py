"""Everything that runs on the LLM Machines, and the code that connects it: ingress, wrapper, engine, meter, cluster."""
