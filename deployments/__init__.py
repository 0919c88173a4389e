"""What runs on the LLM Machines and what wires it: ingress, wrapper, engine, meter, cluster."""
