py=$1; out=$2; std=$3
I=$($py -c "import torch,os;print(os.path.dirname(torch.__file__))")
abi=$($py -c "import torch;print(int(torch._C._GLIBCXX_USE_CXX11_ABI))")
mkdir -p $out; cp torch_testdev.py $out
time g++ -std=$std -O1 -fPIC -shared -w -D_GLIBCXX_USE_CXX11_ABI=$abi -I$I/include -I$I/include/torch/csrc/api/include torch_testdev.cpp -L$I/lib -lc10 -ltorch_cpu -o $out/libtestdev.so
