"""Everything that runs on the LLM Machines (wrapper, engine, meter), and the ingress and cluster that connect them."""
