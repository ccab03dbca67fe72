"""Pure decisions: numbers and a little state in, a proposal out. No torch, no Lightning."""
