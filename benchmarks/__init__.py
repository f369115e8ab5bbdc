"""Speed and fidelity, measured: each module is one command."""
