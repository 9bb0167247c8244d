"""How a fit is made: one module for each way of turning data into draws."""
