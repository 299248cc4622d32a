"""The ops, one file for each: public function, eager reference, fakes, autograd. `fastgen` exports the public functions."""
