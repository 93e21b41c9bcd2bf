"""What each op means, in plain torch: any dtype, any device, differentiable."""
