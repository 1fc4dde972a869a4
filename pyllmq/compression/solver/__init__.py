"""What is solved for one Linear: its Hessian, the column sweep, and who gets how many bits or zeros."""
