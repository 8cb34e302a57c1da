"""Maps without a network: what is offered, what each takes, and how it runs."""
